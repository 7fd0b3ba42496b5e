"""A base model that is quantized while it is loaded, by bitsandbytes or torchao through diffusers. Imports no torch."""

import argparse
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from delora_diffusers.errors import InputError

if TYPE_CHECKING:
    import torch

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
"""The package that each quantized precision needs."""
BASE_PRECISIONS = ("bf16", *PACKAGES)
BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0, "fp8": 1.0}
"""Bytes per quantized weight; nf4 has a float32 scale per 64 weights."""


def add_base_precision_argument(group: Any) -> None:
    """``--base_precision``."""
    group.add_argument(
        "--base_precision",
        choices=BASE_PRECISIONS,
        help="precision of the denoiser's frozen weights: nf4 (needs bitsandbytes) takes a quarter of bf16's memory, "
        "int8 and fp8 (torchao) half; default: that of --mixed_precision",
    )


def check_base_precision(options: argparse.Namespace, device: str | None = None) -> None:
    """Reject a base precision that cannot be used here.

    Args:
        options: with ``base_precision`` and ``mixed_precision``. device: its type, once it is known.

    Raises:
        InputError
    """
    precision = options.base_precision
    package = PACKAGES.get(precision or "")
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(
            f"--base_precision {precision} needs {package}, which is not installed; run `pip install {package}`."
        )
    if precision == "bf16" and options.mixed_precision == "fp16":
        raise InputError("--base_precision bf16 and --mixed_precision fp16 exclude each other; leave out the first.")
    if precision == "nf4" and device == "cpu":
        raise InputError("--base_precision nf4 needs a GPU; use int8, or leave it out.")


def quantization_config(base_precision: str | None, dtype: "torch.dtype", unquantized: Sequence[str]) -> Any:
    """Diffusers' configuration for a precision; None for one that is not quantized.

    nf4 is 4-bit NormalFloat (Dettmers et al., NeurIPS 2023, section 3). int8 and fp8 round the weights only, so that a
    product is that with the dequantized weight, up to rounding.

    Args:
        dtype: that products are computed in. unquantized: parts of names of modules that stay in this dtype.
    """
    if base_precision not in PACKAGES:
        return None
    import diffusers

    skipped = list(unquantized)
    if base_precision == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    kind = quantization.Int8WeightOnlyConfig if base_precision == "int8" else quantization.Float8WeightOnlyConfig
    return diffusers.TorchAoConfig(kind(set_inductor_config=False), modules_to_not_convert=skipped)
