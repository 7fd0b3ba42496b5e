"""Colours and patterns of a toy's surface, as functions of the point on it."""

import math

import torch
from torch import Tensor

COLOURS = {
    "red": (0.70, 0.022, 0.022),
    "orange": (0.92, 0.28, 0.012),
    "yellow": (0.90, 0.68, 0.02),
    "green": (0.03, 0.36, 0.06),
    "turquoise": (0.02, 0.55, 0.55),
    "blue": (0.02, 0.085, 0.60),
    "purple": (0.26, 0.03, 0.46),
    "pink": (0.92, 0.30, 0.48),
    "white": (0.92, 0.92, 0.90),
    "black": (0.018, 0.018, 0.023),
    "brown": (0.24, 0.095, 0.03),
    "grey": (0.33, 0.34, 0.36),
}
"""Linear RGB by name."""

NEUTRALS = ((0.06, 0.06, 0.07), (0.75, 0.72, 0.66), (0.30, 0.18, 0.10))
"""Colours of the details, linear RGB."""

PATTERNS = ("plain", "two-tone", "stripes", "rings", "dots", "checks", "patches")


def edge(value: Tensor, width: float = 0.08) -> Tensor:
    """0 for negative and 1 for positive values, with a smooth step of the given width."""
    t = (value / width + 0.5).clamp(0, 1)
    return t * t * (3 - 2 * t)


def pattern_weight(kind: str, x: Tensor, y: Tensor, z: Tensor, scale: Tensor, phase: Tensor) -> Tensor:
    """The share of the second colour at points of the body, 0 to 1.

    Args:
        kind: one of ``PATTERNS``.
        x, y, z: points in the toy's coordinates.
        scale: fineness, 0 to 1.
        phase: shifts the pattern, 0 to 1.
    """
    if kind == "plain":
        return torch.zeros_like(x)
    if kind == "two-tone":
        return edge(0.42 + 0.25 * phase - y, 0.02)
    angle = torch.atan2(x, z)
    repeats = torch.round(5 + 3 * scale)  # an integer, so that the pattern joins up behind the toy
    turned = angle * repeats + 2 * math.pi * phase
    frequency = 11 + 5 * scale
    if kind == "stripes":
        return edge(torch.cos(turned), 0.25)
    if kind == "rings":
        return edge(torch.sin(y * frequency + 2 * math.pi * phase), 0.25)
    if kind == "checks":
        return edge(torch.cos(turned * 0.5 * 2) * torch.sin(y * frequency), 0.15)
    if kind == "dots":
        row_height = 2 * math.pi / frequency * 0.62
        row = torch.floor(y / row_height)
        along = turned / (2 * math.pi) + 0.5 * (row % 2)
        du = (along - torch.floor(along) - 0.5) * (2 * math.pi / repeats) * torch.sqrt(x * x + z * z + 1e-6)
        dv = y - (row + 0.5) * row_height
        return edge(0.36 * row_height - torch.sqrt(du * du + dv * dv + 1e-9), 0.02)
    assert kind == "patches"
    f = 4.5 + 2.5 * scale
    shift = phase * 20
    blobs = (
        torch.sin(f * x + 1.7 * torch.sin(0.8 * f * y + shift))
        + torch.sin(f * z * 1.1 + 1.3 * torch.sin(f * x * 0.9 + 2 * shift))
        + torch.sin(f * y * 1.2 + 1.5 * torch.sin(f * z * 0.7 + 3 * shift))
    )
    return edge(blobs - 0.55, 0.25)


def noise(x: Tensor, y: Tensor) -> Tensor:
    """Smooth value noise, 0 to 1, from hashed integers: identical on every device."""
    cell_x, cell_y = torch.floor(x), torch.floor(y)
    u, v = x - cell_x, y - cell_y
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = cell_x.to(torch.int64), cell_y.to(torch.int64)
    low = lerp(hashed(i, j), hashed(i + 1, j), u)
    high = lerp(hashed(i, j + 1), hashed(i + 1, j + 1), u)
    return lerp(low, high, v)


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t


def hashed(i: Tensor, j: Tensor) -> Tensor:
    """A hash, 0 to 1, of each pair of integers."""
    h = (i * 374761393 + j * 668265263) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return (h & 0xFFFF).to(torch.float32) / 65535.0
