"""OFT: ``W' = W R^T`` with R orthogonal and block-diagonal (Qiu et al., NeurIPS 2023), by the Cayley parametrization.

Each block is ``R = (I - Q) (I + Q)^-1`` with Q skew-symmetric and stored as its upper triangle; R rotates the inputs,
 ``y = W (x R)``, as in PEFT. The constrained variant, COFT (section 3.2), keeps Q in a ball around 0, and so R near the
identity.
"""

import math

import torch
from torch import Tensor

from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.ether import block_size


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Q = 0: (n, blocks, size (size - 1) / 2), the upper triangle row by row.

    Raises:
        InputError: the number of blocks does not divide the input width.
    """
    return {"Q": torch.zeros(len(weight), *shapes(tuple(weight.shape[1:]), config)["Q"])}, {}


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Q (blocks, size (size - 1) / 2).

    Raises:
        InputError: the number of blocks does not divide the input width.
    """
    size = block_size(weight[1], config.number_of_blocks)
    return {"Q": (config.number_of_blocks, size * (size - 1) // 2)}


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight, computed in that of the tensors."""
    rotation = cayley(tensors["Q"], weight.shape[-1] // tensors["Q"].shape[-2])
    blocks = weight.to(rotation.dtype).unflatten(-1, rotation.shape[-3:-1]).transpose(-3, -2)
    rotated = blocks @ rotation.mT
    return rotated.transpose(-3, -2).flatten(-2).to(weight.dtype)


def constrain(tensors: dict[str, Tensor], config: AdapterConfig) -> None:
    """COFT: scale each block Q with ``|Q|_F > coft_eps s^2 / sqrt(n)`` to that norm, in place; s is its size, n their
    number. OFT's code does the same before every forward."""
    if config.coft_eps is None:
        return
    blocks, entries = tensors["Q"].shape[-2:]
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    largest = config.coft_eps * size**2 / math.sqrt(blocks)
    norms = math.sqrt(2) * torch.linalg.vector_norm(tensors["Q"], dim=-1, keepdim=True)  # of both triangles
    tensors["Q"].copy_(torch.where(norms > largest, tensors["Q"] * (largest / norms), tensors["Q"]))


def cayley(upper: Tensor, size: int) -> Tensor:
    """Orthogonal matrices (..., size, size) from upper triangles (..., size (size - 1) / 2)."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(*upper.shape[:-1], size, size)
    half[..., rows, columns] = upper
    skew = half - half.mT
    identity = torch.eye(size, dtype=upper.dtype, device=upper.device)
    # I + Q is never singular, so solve_ex skips the check, which would synchronize with the device.
    return torch.linalg.solve_ex(identity + skew, identity - skew, left=False).result
