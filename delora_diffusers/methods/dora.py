"""DoRA: ``W' = m V / |V|``, ``V = W + (alpha / r) B A`` (Liu et al., ICML 2024, equation 5), with m learnt or fixed.

Norms and magnitudes are of V's rows, one for each output, as in PEFT. In the backward the norm counts as a constant
(section 4.3 there). With the magnitude fixed at the pretrained weight's only the direction is learnt (Bini et al.,
appendix C).
"""

import torch
from torch import Tensor

from delora_diffusers.methods import lora, update
from delora_diffusers.methods.config import AdapterConfig


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A (n, r, in) kaiming-uniform, B (n, out, r) zero, magnitude (n, out): the norms of the rows."""
    trainable, fixed = lora.initialize(weight, config, generator)
    magnitude = {"magnitude": torch.linalg.vector_norm(weight.float(), dim=-1)}
    if config.method == "dora_fixed_magnitude":
        return trainable, fixed | magnitude
    return trainable | magnitude, fixed


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight, computed in that of the tensors."""
    b, a = lora.factors(tensors, config)
    v = update.materialize(weight.to(a.dtype), b, a)
    norm = torch.linalg.vector_norm(v.detach(), dim=-1)
    return (v * (tensors["magnitude"] / norm)[..., None]).to(weight.dtype)
