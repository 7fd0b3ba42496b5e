"""Start accelerate, and say in a sentence what it is configured for that does not work here."""

import os
from typing import Any

import torch
from accelerate import Accelerator

from delora_diffusers.errors import InputError, reason

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
    "ACCELERATE_USE_FP8": "fp8",
}
"""What the environment variables of ``accelerate launch`` turn on."""


def launched_accelerator(**arguments: Any) -> Accelerator:
    """The accelerator of this process.

    Raises:
        InputError: accelerate is configured for something that the project does not run under, or the device lacks what
            the flags ask for.
    """
    for variable, name in UNSUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on"):
            raise InputError(
                f"accelerate is configured for {name}, which adapters neither need nor support; run `accelerate "
                "config` again, or pass --multi_gpu to `accelerate launch` for several GPUs."
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(arguments.get("gradient_accumulation_steps", steps))):
        raise InputError(
            f"accelerate is configured for {steps} gradient accumulation steps, which override the flag; pass "
            f"--gradient_accumulation_steps {steps}, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS."
        )
    precision = arguments.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"accelerate is configured for {precision}; pass --mixed_precision bf16, fp16 or no.")
    try:
        accelerator = Accelerator(**arguments)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"accelerate could not start ({reason(error)}); check `accelerate env`, or pass --mixed_precision no."
        ) from error
    # Torch emulates bf16 on older cards, such as the T4, many times slower than they compute in fp16.
    if precision == "bf16" and accelerator.device.type == "cuda" and not has_bf16():
        raise InputError(f"{torch.cuda.get_device_name()} does not compute in bf16; pass --mixed_precision fp16.")
    return accelerator


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
