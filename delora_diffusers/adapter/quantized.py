"""Linear modules whose weights bitsandbytes or torchao stores in fewer bits than they are computed in."""

from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's weight is quantized."""
    weight: Any = module._parameters.get("weight")
    return type(weight).__module__.split(".")[0] in ("bitsandbytes", "torchao")


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a quantized module, (out, in), in the dtype it is computed in."""
    raise NotImplementedError


def quantized_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a quantized module's products are computed."""
    raise NotImplementedError
