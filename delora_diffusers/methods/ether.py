"""ETHER and ETHER+: reflections of the weight's inputs, and outputs (Bini et al., ICML 2024).

ETHER reflects across a hyperplane, ``W' = W H`` with ``H = I - 2 u u^T``, |u| = 1: its distance from the identity is
always ``|H - I|_F = 2``, so it cannot start at the pretrained model. ETHER+ relaxes it to ``H = I - u u^T + v v^T``,
whose distance is at most 2 (sqrt 2, in fact), starts from ``v = -u``, where H is the identity, and acts on both sides,
``W' = H2 W H``; ``etherplus_onesided`` acts on the inputs only. With n blocks, H is block-diagonal and each block has
its own vector and its own distance.

Layout: H acts on the inputs, as in the authors' code. That code splits the weight into blocks with ``reshape``, which
mixes rows if there is more than one block; here a block is a range of inputs (or outputs), as in the paper's equation.
"""

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.methods import update
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.lora import kaiming


def initialize(
    weight: Tensor, config: AdapterConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """u (n, blocks, in / blocks) kaiming-uniform; for ETHER+ also v = -u, and u2, v2 for the outputs.

    Raises:
        InputError: the number of blocks does not divide the input or output width.
    """
    trainable = {}
    for key, shape in shapes(tuple(weight.shape[1:]), config).items():
        if key.startswith("u"):
            trainable[key] = kaiming((len(weight), *shape), shape[-1], generator)
        else:
            trainable[key] = -trainable[key.replace("v", "u")]
    return trainable, {}


def shapes(weight: tuple[int, ...], config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """u (blocks, in / blocks); for ETHER+ also v, and u2, v2 (blocks, out / blocks).

    Raises:
        InputError: the number of blocks does not divide the input or output width.
    """
    out_features, in_features = weight
    blocks = config.number_of_blocks
    inputs = (blocks, block_size(in_features, blocks))
    if config.method == "ether":
        return {"u": inputs}
    if config.method == "etherplus_onesided":
        return {"u": inputs, "v": inputs}
    outputs = (blocks, block_size(out_features, blocks))
    return {"u": inputs, "v": inputs, "u2": outputs, "v2": outputs}


def block_size(width: int, blocks: int) -> int:
    """The width of each block.

    Raises:
        InputError: the number of blocks does not divide the width.
    """
    if width % blocks:
        raise InputError(f"blocks is {blocks}, which does not divide a projection of width {width}; choose a divisor.")
    return width // blocks


def adapted_weight(weight: Tensor, tensors: dict[str, Tensor], config: AdapterConfig) -> Tensor:
    """W' (n, out, in) in the dtype of the weight, computed in that of the tensors."""
    exact = weight.to(tensors["u"].dtype)
    if config.method == "ether":
        return (exact - 2 * projected(exact, tensors["u"])).to(weight.dtype)
    # Subtract the two projections first: at the start they are equal, so that W' equals W bit for bit.
    exact = exact + (projected(exact, tensors["v"]) - projected(exact, tensors["u"]))
    if "u2" in tensors:
        transposed = exact.mT
        exact = exact + (projected(transposed, tensors["v2"]) - projected(transposed, tensors["u2"])).mT
    return exact.to(weight.dtype)


def projected(weight: Tensor, vectors: Tensor) -> Tensor:
    """``W u u^T`` block by block, (n, out, in), for W (n, out, in) and u (n, blocks, in / blocks) of any length."""
    unit = update.normalize(vectors, dim=-1)[:, None]
    along = (weight.unflatten(-1, unit.shape[-2:]) * unit).sum(dim=-1, keepdim=True)
    return (along * unit).flatten(-2)
