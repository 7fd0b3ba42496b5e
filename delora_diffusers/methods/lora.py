"""LoRA: ``W' = W + (alpha / r) B A`` (Hu et al., ICLR 2022), initialized with B = 0."""

import math

import torch
from torch import Tensor

from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig


def kaiming(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with a = sqrt(5), the default for ``nn.Linear``: uniform within +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def initialize(
    weight: Tensor | update.Matrices, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A (n, r, in) kaiming-uniform, B (n, out, r) zero."""
    n, out_features, in_features = weight.shape
    a = kaiming((n, config.rank, in_features), in_features, generator)
    return {"A": a, "B": torch.zeros(n, out_features, config.rank)}, {}


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A (r, in), B (out, r)."""
    out_features, in_features = weight
    return {"A": (config.rank, in_features), "B": (out_features, config.rank)}


def factors(tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[Tensor, Tensor]:
    """B~ (n, out, r) and A~ (n, r, in) with ``W' - W = B~ A~``."""
    return tensors["B"] * config.lora_scale, tensors["A"]


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight."""
    return update.materialize(weight, *factors(tensors, config))
