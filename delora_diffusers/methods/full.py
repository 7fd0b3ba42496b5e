"""Full fine-tuning: ``W'`` itself is trained, as in DreamBooth (Ruiz et al., CVPR 2023). Weights may have any shape."""

import torch
from torch import Tensor

from delora_diffusers.methods.config import AdapterConfig


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A float32 copy of the weight, (n, ...)."""
    return {"W": weight.detach().to(torch.float32, copy=True)}, {}


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """W, the weight itself."""
    return {"W": weight}


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, ...) in the dtype of the weight."""
    return tensors["W"].to(weight.dtype)
