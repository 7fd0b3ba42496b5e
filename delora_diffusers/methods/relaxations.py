"""The methods between ETHER+ and DeLoRA (Bini et al., ICLR 2025, table 2): multiplicative, with a learnable boundary.

``delora_symmetric``: ``dW = (lambda / r) (U Sigma U^T - V Theta V^T) W``; for r = 1 this is
``lambda (u u^T - v v^T) W``. ``delora_multiplicative``: ``dW = (lambda / r) (B Xi A - D Phi C) W``. The diagonal
matrices divide by norms, so each of the two terms in the bracket has Frobenius norm at most r, and dW at most
``2 lambda |W|``.

The bracket acts on the inputs, like ETHER's reflection: in torch's layout it multiplies W from the right.
"""

import torch
from torch import Tensor

from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.lora import kaiming


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Kaiming-uniform B (n, in, r) and A (n, r, in), with their copies D and C; or U with its copy V; lambda (n,).

    The default lambda is 1, ETHER+'s fixed boundary, so that each row of the table changes one thing only.
    """
    n, _, in_features = weight.shape
    bound = 1.0 if config.delora_lambda is None else config.delora_lambda
    trainable = {"lambda": torch.full((n,), float(bound))}
    first = kaiming((n, in_features, config.rank), in_features, generator)
    if config.method == "delora_symmetric":
        return trainable | {"U": first, "V": first.clone()}, {}
    second = kaiming((n, config.rank, in_features), in_features, generator)
    return trainable | {"B": first, "A": second, "D": first.clone(), "C": second.clone()}, {}


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """lambda (); U and V (in, r), or B and D (in, r) with A and C (r, in)."""
    tall, wide = (weight[1], config.rank), (config.rank, weight[1])
    if config.method == "delora_symmetric":
        return {"lambda": (), "U": tall, "V": tall}
    return {"lambda": (), "B": tall, "A": wide, "D": tall, "C": wide}


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight, computed in that of the tensors."""
    if config.method == "delora_symmetric":
        sides = [(tensors[key], tensors[key].mT) for key in ("U", "V")]
    else:
        sides = [(tensors["B"], tensors["A"]), (tensors["D"], tensors["C"])]
    exact = weight.to(tensors["lambda"].dtype)
    plus, minus = (exact @ update.normalize(b, dim=-2) @ update.normalize(a, dim=-1) for b, a in sides)
    strength = (tensors["lambda"] / config.rank)[:, None, None]
    return (exact + strength * (plus - minus)).to(weight.dtype)
