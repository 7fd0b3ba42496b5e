"""DeLoRA's update as pure functions on stacked tensors, in float32 regardless of the model's dtype.

Shapes: n matrices of one shape are stacked; W is (n, out, in), A (n, r, in), B (n, out, r), lambda (n,). The update is
stored as two factors, ``dW = B~ @ A~`` with B~ (n, out, k) and A~ (n, k, in), which serve both forms of the adapted
product: materialised (``W' = W + B~ A~``, once per step) and split (``x W^T + (x A~^T) B~^T``, at every call).

Reference: Bini, Girrbach, Akata, "Decoupling Angles and Strength in Low-rank Adaptation", ICLR 2025 (arXiv 2503.18225).
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

MIN_NORM = 1e-4
"""The lower bound for norms, as in PEFT: a vanishing row is scaled by at most 1e4, and so is its gradient."""


class Matrices(Protocol):
    """n matrices of one shape that are read one after the other, because together they may not fit in memory."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, out, in)"""
        ...

    def __iter__(self) -> Iterator[Tensor]:
        """Each matrix, (out, in)."""
        ...


def weight_norm(weight: Tensor | Matrices, kind: str) -> Tensor | None:
    """The scale c of the update: the norm of the pretrained weight.

    Args:
        weight: (n, out, in), any floating dtype.
        kind: ``"column"`` for (n, in), the norm of each input column; ``"frobenius"`` for (n,) (equation 8);
            ``"none"`` for None.

    Returns:
        float32 tensor, or None.
    """
    if kind == "none":
        return None
    if not isinstance(weight, Tensor):
        norms = [weight_norm(matrix[None], kind) for matrix in weight]
        return torch.cat([norm for norm in norms if norm is not None])
    # With a dtype the norm needs no copy of the weight in that dtype.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1 if kind == "column" else (1, 2), dtype=dtype).float()


def normalize(vectors: Tensor, dim: int) -> Tensor:
    """Divide vectors along ``dim`` by their norms, which are clamped to at least ``MIN_NORM``."""
    return _Normalize.apply(vectors, dim)


class _Normalize(torch.autograd.Function):
    """``normalize`` with its gradient in five kernels; autograd's own takes about twenty."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, dim: int) -> Tensor:
        norms = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
        clamped = norms.clamp_min(MIN_NORM)
        unit = vectors / clamped
        ctx.dim = dim
        ctx.save_for_backward(unit, norms, clamped)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """``(g - u (u . g)) / |v|``, without the second term where the norm is clamped."""
        unit, norms, clamped = ctx.saved_tensors
        along = (unit * grad).sum(dim=ctx.dim, keepdim=True) * (norms >= MIN_NORM)
        return torch.addcmul(grad, unit, along, value=-1) / clamped, None


def delora_factors(
    a: Tensor,
    b: Tensor,
    delora_lambda: Tensor,
    w_norm: Tensor | None = None,
    a0: Tensor | None = None,
    b0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors of ``dW = (lambda / r) (B Xi A - B0 Xi0 A0) * c`` (section 3.1, equations 7 to 9).

    With a frozen start, the difference of the two products is computed as ``(B^ - B0^) A^ + B0^ (A^ - A0^)``, where ^
    divides by norms: it is exactly zero, not just up to rounding, while A and B equal A0 and B0, and small differences
    are not lost in a subtraction of large products.

    Args:
        a: (n, r, in). b: (n, out, r). delora_lambda: (n,). All float32 (or float64).
        w_norm: (n, in), (n,) or None, from ``weight_norm``.
        a0, b0: the frozen start, with the shapes of a and b; None for a start from B = 0.

    Returns:
        B~ (n, out, k) and A~ (n, k, in) with ``dW = B~ @ A~``; k is r, or 2r with a frozen start. Each of the r
        rank-1 terms of a product has Frobenius norm at most ``lambda / r * max(c)``.
    """
    rank = a.shape[-2]
    a_hat, b_hat = normalize(a, dim=-1), normalize(b, dim=-2)
    if a0 is not None and b0 is not None:
        a0_hat, b0_hat = normalize(a0, dim=-1), normalize(b0, dim=-2)
        a_hat, b_hat = torch.cat((a_hat, a_hat - a0_hat), dim=-2), torch.cat((b_hat - b0_hat, b0_hat), dim=-1)
    strength = (delora_lambda / rank)[:, None, None]
    if w_norm is not None and w_norm.ndim == 1:
        strength = strength * w_norm[:, None, None]
    if w_norm is not None and w_norm.ndim == 2:
        a_hat = a_hat * w_norm[:, None, :]
    return b_hat * strength, a_hat


def materialize(weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """``W' = W + B~ A~`` in the dtype of the weight.

    Args:
        weight: (n, out, in). b: (n, out, k). a: (n, k, in). The factors are cast to the weight's dtype.
    """
    return torch.baddbmm(weight, b.to(weight.dtype), a.to(weight.dtype))


def frobenius_norm(b: Tensor, a: Tensor) -> Tensor:
    """``|B~ A~|_F`` of each of n products, (n,), without forming them: the trace of ``(B~^T B~)(A~ A~^T)``."""
    squared = ((b.mT @ b) * (a @ a.mT)).sum(dim=(-2, -1))
    return squared.clamp_min(0).sqrt()
