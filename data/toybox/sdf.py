"""Signed distances of simple solids; coordinates are separate tensors, all lengths are in toy units.

Every function takes tensors of the same shape (or numbers) and returns the distance to the surface, negative inside. A
few return bounds instead of exact distances, which exceed the distance by at most a small factor.
"""

import torch
from torch import Tensor

Number = Tensor | float


def length(*parts: Number) -> Tensor:
    total = None
    for part in parts:
        total = part * part if total is None else total + part * part
    assert isinstance(total, Tensor)
    return torch.sqrt(total + 1e-12)


def sphere(x: Tensor, y: Tensor, z: Tensor, radius: Number) -> Tensor:
    return length(x, y, z) - radius


def ellipsoid(x: Tensor, y: Tensor, z: Tensor, a: Number, b: Number, c: Number) -> Tensor:
    outer = length(x / a, y / b, z / c)
    inner = length(x / (a * a), y / (b * b), z / (c * c))
    return outer * (outer - 1) / inner


def box(x: Tensor, y: Tensor, z: Tensor, a: Number, b: Number, c: Number, rounding: Number = 0.0) -> Tensor:
    """A box with half sides a, b, c; rounding the edges does not enlarge it."""
    qx, qy, qz = x.abs() - a + rounding, y.abs() - b + rounding, z.abs() - c + rounding
    outside = length(qx.clamp(min=0), qy.clamp(min=0), qz.clamp(min=0))
    return outside + torch.maximum(qx, torch.maximum(qy, qz)).clamp(max=0) - rounding


def disc(across: Tensor, along: Tensor, radius: Number, half: Number, rounding: Number = 0.0) -> Tensor:
    """A cylinder, given the distance from its axis and the position along it."""
    q, h = across - radius + rounding, along.abs() - half + rounding
    return length(q.clamp(min=0), h.clamp(min=0)) + torch.maximum(q, h).clamp(max=0) - rounding


def torus(x: Tensor, y: Tensor, z: Tensor, ring: Number, tube: Number) -> Tensor:
    """A ring in the plane z = 0."""
    return length(length(x, y) - ring, z) - tube


def capsule(x: Tensor, y: Tensor, z: Tensor, a: tuple, b: tuple, radius: Number, end_radius: Number) -> Tensor:
    """A rod from point a to point b whose radius changes linearly."""
    dx, dy, dz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    px, py, pz = x - a[0], y - a[1], z - a[2]
    along = ((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz)).clamp(0, 1)
    return length(px - along * dx, py - along * dy, pz - along * dz) - (radius + along * (end_radius - radius))


def cone(across: Tensor, y: Tensor, low: Number, high: Number, r_low: Number, r_high: Number) -> Tensor:
    """A truncated cone around the y axis from height low to high, given the distance from the axis."""
    slope = (r_low - r_high) / (high - low)
    tilt = torch.rsqrt(torch.as_tensor(1 + slope * slope))
    side = (across - (r_low - (y - low) * slope)) * tilt
    return torch.maximum(side, torch.maximum(low - y, y - high))


def blend(a: Tensor, b: Tensor, width: float) -> Tensor:
    """The union of two solids with a smooth transition."""
    h = (0.5 + 0.5 * (b - a) / width).clamp(0, 1)
    return b + (a - b) * h - width * h * (1 - h)


def union(*solids: Tensor) -> Tensor:
    combined = solids[0]
    for solid in solids[1:]:
        combined = torch.minimum(combined, solid)
    return combined


def carve(solid: Tensor, hollow: Tensor) -> Tensor:
    return torch.maximum(solid, -hollow)
