"""Adapted projections: a linear module, or several that read the same input, computed with the adapted weight."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from delora_diffusers.adapter.base_weights import dense_weight
from delora_diffusers.adapter.lean import lean_linear


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
        self.lean = False
        # (g * out, in): W' on the fast path, W on the others; (subjects, g * out, in) with several subjects. None if
        # the modules are to be asked for W, because it is quantized or not always on the device.
        self.weight: Tensor | None = None
        self.a: Tensor | None = None  # (g, k, in), not on the fast path
        self.b: Tensor | None = None  # (g, out, k), not on the fast path
        # Sets a and b again. If given, they are released after a use, because gradient checkpointing repeats it.
        self.restore: Callable[[], None] | None = None
        self.restored = False

    def __call__(self, x: Tensor, first: int = 0, count: int | None = None) -> Sequence[Tensor]:
        """The outputs (..., out) of ``count`` modules starting at index ``first``, computed as one product.

        Args:
            x: (..., in).
        """
        if self.a is None and self.restore is not None:
            self.restore()
        weight, a, b, linears = self.weight, self.a, self.b, self.linears
        if self.restore is not None and not self.restored:
            self.a = self.b = None
        assert weight is not None or a is not None, "the adapter has no weights yet; call adapter.refresh() first"
        if count is not None and count != len(linears):
            # Slice only if necessary: the backward of a slice fills a full-size tensor with zeros.
            members, out_features = slice(first, first + count), linears[0].out_features
            if weight is not None:
                weight = weight[..., first * out_features : (first + count) * out_features, :]
            linears = linears[members]
            a, b = (None, None) if a is None or b is None else (a[members], b[members])
        if a is not None and b is not None and self.lean:
            base = functools.partial(joint_weight, linears) if weight is None else weight
            return _outputs(lean_linear(x, base, b, a, _joint_bias(linears)), len(linears))
        if weight is None:
            outputs = [stock_forward(linear, x) for linear in linears]
        else:
            product = nn.functional.linear if weight.ndim == 2 else linear_by_subject
            outputs = _outputs(product(x, weight, _joint_bias(linears)), len(linears))
        if a is None or b is None:
            return outputs
        return [y + d.to(y.dtype) for y, d in zip(outputs, low_rank_product(x, a, b))]


def _outputs(y: Tensor, count: int) -> Sequence[Tensor]:
    """The outputs (..., out) of each module from those of all, (..., count * out)."""
    return y.chunk(count, dim=-1) if count > 1 else (y,)


def _joint_bias(linears: Sequence[Any]) -> Tensor | None:
    """The biases of modules that read the same input, (g * out,)."""
    bias = linears[0].bias
    return bias if bias is None or len(linears) == 1 else torch.cat([linear.bias for linear in linears])


def stock_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a module's own code, without an adapter's or another library's changes to its ``forward``."""
    return type(module).forward(module, x)


def joint_weight(linears: Sequence[nn.Module]) -> Tensor:
    """The pretrained weights of modules that read the same input, (g * out, in)."""
    weights = [dense_weight(linear) for linear in linears]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def linear_by_subject(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W'^T`` where each sample uses its subject's W': x (subjects * batch, ..., in), W' (subjects, out, in)."""
    y = x.reshape(len(weight), -1, x.shape[-1]) @ weight.mT
    return (y if bias is None else y + bias).view(*x.shape[:-1], weight.shape[1])


def low_rank_product(x: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """``(x A~^T) B~^T`` in the factors' dtype for x (..., in), A~ (g, k, in), B~ (g, out, k): g tensors (..., out)."""
    with torch.autocast(x.device.type, enabled=False):
        hidden = nn.functional.linear(x.to(a.dtype), a.flatten(0, 1)).chunk(len(a), dim=-1)
        return [nn.functional.linear(h, b_i) for h, b_i in zip(hidden, b)]
