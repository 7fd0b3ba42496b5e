"""DoRA: ``W' = m V / |V|``, ``V = W + (alpha / r) B A`` (Liu et al., ICML 2024, equation 5), with m learned or fixed.

Norms and magnitudes are taken over V's rows, one per output, as in PEFT. The backward treats the norm as a constant
(section 4.3 of the paper). If the magnitude is fixed at that of the pretrained weight, only the direction is learned
(Bini et al., appendix C).
"""

import torch
from torch import Tensor

from delora_diffusers.methods import lora, update
from delora_diffusers.methods.config import AdapterConfig


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A (n, r, in) kaiming-uniform, B (n, out, r) zero, magnitude (n, out): the norms of W's rows."""
    trainable, fixed = lora.initialize(weight, config, generator)
    magnitude = {"magnitude": torch.linalg.vector_norm(weight.float(), dim=-1)}
    if config.method == "dora_fixed_magnitude":
        return trainable, fixed | magnitude
    return trainable | magnitude, fixed


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A (r, in), B (out, r), magnitude (out,)."""
    return lora.shapes(weight, config) | {"magnitude": weight[:1]}


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight, computed in that of the tensors."""
    b, a = lora.factors(tensors, config)
    v = update.materialize(weight.to(a.dtype), b, a)
    norm = torch.linalg.vector_norm(v.detach(), dim=-1)
    return (v * (tensors["magnitude"] / norm)[..., None]).to(weight.dtype)
