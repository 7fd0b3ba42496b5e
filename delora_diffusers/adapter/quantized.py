"""Linear modules whose weights bitsandbytes or torchao stores in fewer bits than they are computed in."""

from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is quantized."""
    return type(module._parameters.get("weight")).__module__.split(".")[0] in ("bitsandbytes", "torchao")


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized module, (out, in), in the dtype it is computed in."""
    weight: Any = module._parameters["weight"]
    if hasattr(weight, "dequantize") and not hasattr(weight, "bnb_quantized"):
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(weight.data, weight.quant_state)


def quantized_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a quantized module's products are computed."""
    weight: Any = module._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else state.dtype
