"""The lean path: W' of one product is made when it is used, and again in the backward; only its input is kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Weight = Tensor | Callable[[], Tensor]
"""W (g * out, in), or a function that returns it each time it is needed."""


def lean_linear(x: Tensor, weight: Weight, b: Tensor, a: Tensor, bias: Tensor | None) -> Tensor:
    """``x (W + B~ A~)^T + bias`` (..., g * out) of g modules with the same input, without keeping W' for the backward.

    Args:
        x: (..., in). weight: frozen. b: (g, out, k). a: (g, k, in), in the dtype of the weight. bias:
            (g * out,), frozen.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, b, a = x.to(dtype), b.to(dtype), a.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return _LeanLinear.apply(x, weight, b, a, bias)
    return _LeanLinear.apply(x, weight, b, a, bias)


def _adapted(weight: Weight, b: Tensor, a: Tensor) -> Tensor:
    """W' (g * out, in) in the dtype of the factors."""
    dense = weight if isinstance(weight, Tensor) else weight()
    return torch.baddbmm(dense.to(a.dtype).unflatten(0, b.shape[:2]), b, a).flatten(0, 1)


class _LeanLinear(torch.autograd.Function):
    """With ``Y = X W'^T`` and the gradient G of Y: ``dX = G W'``, ``dB~ = G^T (X A~^T)`` and ``dA~ = (G B~)^T X``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, b: Tensor, a: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, b, a)
        ctx.weight = weight
        return nn.functional.linear(x, _adapted(weight, b, a), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, b, a = ctx.saved_tensors
        needs_x, _, needs_b, needs_a, _ = ctx.needs_input_grad
        grad_x = grad @ _adapted(ctx.weight, b, a) if needs_x else None
        tokens = x.reshape(-1, x.shape[-1])
        if len(a) == 1:  # the general case below, with fewer operations to launch
            rows = grad.reshape(-1, grad.shape[-1])
            grad_b = (rows.mT @ (tokens @ a[0].mT))[None] if needs_b else None
            return grad_x, None, grad_b, ((rows @ b[0]).mT @ tokens)[None] if needs_a else None, None
        by_module = grad.reshape(-1, *b.shape[:2])  # (tokens, g, out)
        grad_a = grad_b = None
        if needs_b:
            hidden = (tokens @ a.flatten(0, 1).mT).unflatten(-1, (len(a), -1))  # (tokens, g, k)
            grad_b = by_module.permute(1, 2, 0) @ hidden.transpose(0, 1)
        if needs_a:
            back = by_module.transpose(0, 1) @ b  # (g, tokens, k)
            grad_a = (back.mT.flatten(0, 1) @ tokens).view_as(a)
        return grad_x, None, grad_b, grad_a, None
