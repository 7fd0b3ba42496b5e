"""DeLoRA: ``W' = W + (lambda / r) (B Xi A - B0 Xi0 A0) * c`` (Bini et al., ICLR 2025, equations 7 to 9)."""

import math

import torch
from torch import Tensor

from delora_diffusers.methods import lora, update
from delora_diffusers.methods.config import RELATIVE_BOUND, AdapterConfig
from delora_diffusers.methods.lora import kaiming


def initialize(
    weight: Tensor | update.Matrices, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kaiming-uniform A (n, r, in) and B (n, out, r), or B = 0; lambda (n,); fixed: scale, frozen start."""
    n, out_features, in_features = weight.shape
    a = kaiming((n, config.rank, in_features), in_features, generator)
    if config.start == "zero":
        b = torch.zeros(n, out_features, config.rank)
    else:
        b = kaiming((n, out_features, config.rank), config.rank, generator)
    trainable = {"A": a, "B": b, "lambda": initial_lambda(weight, config)}
    fixed = {}
    scale = update.weight_norm(weight, config.weight_norm)
    if scale is not None:
        fixed["w_norm"] = scale
    if config.start == "frozen":
        fixed |= {"A0": a.clone(), "B0": b.clone()}
    return trainable, fixed


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A (r, in), B (out, r), lambda (), the scale and the frozen start."""
    product = lora.shapes(weight, config)
    scale = {"column": {"w_norm": weight[1:]}, "frobenius": {"w_norm": ()}, "none": {}}[config.weight_norm]
    start = {"A0": product["A"], "B0": product["B"]} if config.start == "frozen" else {}
    return {**product, "lambda": (), **scale, **start}


def initial_lambda(weight: Tensor | update.Matrices, config: AdapterConfig) -> Tensor:
    """The initial boundary of each matrix (n,): as configured, or the default for its width (see ``AdapterConfig``)."""
    n, _, in_features = weight.shape
    if config.delora_lambda is not None:
        return torch.full((n,), float(config.delora_lambda))
    bound = RELATIVE_BOUND if config.relative_bound is None else config.relative_bound
    if config.weight_norm == "none":
        norms = update.weight_norm(weight, "frobenius")
        assert norms is not None
        return bound * (norms if norms.is_meta else norms.cpu())
    width = math.sqrt(in_features) if config.weight_norm == "column" else 1.0
    return torch.full((n,), bound * width)


def factors(tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[Tensor, Tensor]:
    """B~ (n, out, k), A~ (n, k, in) with ``W' - W = B~ A~``; k = 2r with a frozen start, else r."""
    return update.delora_factors(
        tensors["A"],
        tensors["B"],
        tensors["lambda"],
        tensors.get("w_norm"),
        tensors.get("A0"),
        tensors.get("B0"),
    )


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight."""
    return update.materialize(weight, *factors(tensors, config))
