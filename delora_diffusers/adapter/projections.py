"""Adapted projections: a linear module, or several that read the same input, computed with the adapted weight."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def base_parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """The pretrained parameter of a module, (out, in) if linear, whether or not it is parametrized."""
    if parametrize.is_parametrized(module, name):
        return module.get_parameter(f"parametrizations.{name}.original")
    return module.get_parameter(name)


class Projection:
    """One matrix product: a linear module, or several of the same shape that read the same input.

    Stores the current adapted weights, which the adapter refreshes. Not an ``nn.Module``: it has no state to save.

    Args:
        names: the modules' names; full fine-tuning also adapts single parameters of any module, by parameter name.
        linears: the modules.
        parameter: the parameter that is adapted.
    """

    def __init__(self, names: tuple[str, ...], linears: tuple[nn.Module, ...], parameter: str = "weight"):
        self.names = names
        self.linears: tuple[Any, ...] = linears
        self.parameter = parameter
        # (g * out, in): W' on the fast path, W on the split path; (subjects, g * out, in) with several subjects.
        self.weight: Tensor | None = None
        self.a: Tensor | None = None  # (g, k, in), split path only
        self.b: Tensor | None = None  # (g, out, k), split path only

    def __call__(self, x: Tensor, first: int = 0, count: int | None = None) -> Sequence[Tensor]:
        """The outputs (..., out) of ``count`` modules starting at index ``first``, computed as one product.

        Args:
            x: (..., in).
        """
        assert self.weight is not None, "the adapter has not computed its weights yet; call adapter.refresh() first"
        weight, a, b, linears = self.weight, self.a, self.b, self.linears
        if count is not None and count != len(linears):
            # Slice only if necessary: the backward of a slice fills a full-size tensor with zeros.
            members, out_features = slice(first, first + count), linears[0].out_features
            weight = weight[..., first * out_features : (first + count) * out_features, :]
            linears = linears[members]
            a, b = (None, None) if a is None or b is None else (a[members], b[members])
        bias = linears[0].bias
        if bias is not None and len(linears) > 1:
            bias = torch.cat([linear.bias for linear in linears])
        y = nn.functional.linear(x, weight, bias) if weight.ndim == 2 else linear_by_subject(x, weight, bias)
        outputs = y.chunk(len(linears), dim=-1) if len(linears) > 1 else (y,)
        if a is None or b is None:
            return outputs
        return [y + d.to(y.dtype) for y, d in zip(outputs, low_rank_product(x, a, b))]


def linear_by_subject(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W'^T`` where each sample uses its subject's W': x (subjects * batch, ..., in), W' (subjects, out, in)."""
    y = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[1])


def low_rank_product(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """``(x A~^T) B~^T`` in the factors' dtype for x (..., in), A~ (g, k, in), B~ (g, out, k): g tensors (..., out)."""
    with torch.autocast(x.device.type, enabled=False):
        hidden = nn.functional.linear(x.to(a.dtype), a.flatten(0, 1)).chunk(len(a), dim=-1)
        return [nn.functional.linear(h, b_i) for h, b_i in zip(hidden, b)]
