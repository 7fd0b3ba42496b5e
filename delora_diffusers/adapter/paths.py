"""Which way of computing adapted products ``path="auto"`` stands for."""

import math
from collections.abc import Sequence

from delora_diffusers.adapter.base_weights import compute_dtype, weight_shape
from delora_diffusers.adapter.projections import Projection
from delora_diffusers.adapter.quantized import is_quantized
from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import AdapterConfig
from delora_diffusers.methods.table import METHODS

LEAN_FROM = 128 * 2**20
"""Bytes of adapted weights from which ``auto`` is lean. The fast path keeps twice as much for the backward."""


def choose_path(
    config: AdapterConfig, projections: Sequence[Projection], subjects: int, offloaded: bool = False
) -> str:
    """The path on which these projections are computed: ``fast``, ``lean`` or ``split``.

    Raises:
        InputError: the model is quantized or offloaded, and the method or path cannot adapt that.
    """
    method = METHODS[config.method]
    if any(is_quantized(module) for projection in projections for module in projection.linears):
        if not method.has_factors:
            raise InputError(
                f"the model is quantized, which {method.title} cannot adapt; use DeLoRA or LoRA, or "
                "--base_precision bf16."
            )
        if config.path == "fast":
            raise InputError("path is 'fast', but the model is quantized; use 'split', 'lean' or 'auto'.")
        return "split" if config.path == "auto" else config.path
    if offloaded and (config.path == "fast" or not method.has_factors):
        raise InputError(
            f"the model's weights are offloaded, which {method.title} on the fast path cannot adapt; use DeLoRA or "
            "LoRA on the lean or split path."
        )
    if config.path != "auto":
        return config.path
    if offloaded:
        return "lean"
    if subjects > 1 or not method.has_factors or adapted_bytes(projections) < LEAN_FROM:
        return "fast"
    return "lean"


def adapted_bytes(projections: Sequence[Projection]) -> int:
    """Bytes of the adapted weights in the dtype they are computed in."""
    modules = [(module, part.parameter) for part in projections for module in part.linears]
    return sum(math.prod(weight_shape(*site)) * compute_dtype(*site).itemsize for site in modules)
