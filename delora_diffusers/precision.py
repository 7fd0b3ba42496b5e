"""The dtypes that ``--mixed_precision`` and ``--base_precision`` stand for."""

import torch


def dtype_of(mixed_precision: str | None) -> torch.dtype:
    """The dtype of frozen models for accelerate's ``mixed_precision``."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)
