"""The dtypes that ``--mixed_precision`` and ``--base_precision`` stand for."""

import torch


def dtype_of(mixed_precision: str | None) -> torch.dtype:
    """The dtype of frozen models for accelerate's ``mixed_precision``."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


def denoiser_dtype(base_precision: str | None, mixed_precision: str | None) -> torch.dtype:
    """The dtype that the denoiser computes in, whether or not its weights are quantized."""
    return torch.bfloat16 if base_precision == "bf16" else dtype_of(mixed_precision)
