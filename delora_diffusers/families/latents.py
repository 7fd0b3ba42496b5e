"""The scale between an autoencoder's latents and those that the denoiser is trained on, and 2 x 2 patches of them."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class LatentScale:
    """``(x - mean) / std * factor``; Stable Diffusion's autoencoders have a factor only.

    Attributes:
        factor: ``scaling_factor``. mean, std: of each channel, (1, channels, 1, 1), or None.
    """

    factor: float = 1.0
    mean: Tensor | None = None
    std: Tensor | None = None

    def scaled(self, latents: Tensor) -> Tensor:
        """The denoiser's latents (batch, channels, height, width) from the autoencoder's."""
        if self.mean is None or self.std is None:
            return latents * self.factor
        return (latents - self.mean.to(latents)) * self.factor / self.std.to(latents)

    def on(self, device: torch.device) -> "LatentScale":
        """The same scale with its tensors on a device."""
        if self.mean is None or self.std is None:
            return self
        return LatentScale(self.factor, self.mean.to(device), self.std.to(device))

    def unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents from the denoiser's."""
        if self.mean is None or self.std is None:
            return latents / self.factor
        return latents * self.std.to(latents) / self.factor + self.mean.to(latents)


def configured_scale(config: Any) -> LatentScale:
    """The scale in an autoencoder's configuration: a factor, and a shift or each channel's mean and deviation."""
    factor = getattr(config, "scaling_factor", None) or 1.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is not None and std is not None:
        return LatentScale(factor, *(torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std)))
    shift = getattr(config, "shift_factor", None)
    if not shift:
        return LatentScale(factor)
    return LatentScale(factor, torch.tensor(shift).view(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def to_tokens(latents: Tensor) -> Tensor:
    """Latents (batch, channels, height, width) as tokens (batch, height / 2 * width / 2, channels * 4)."""
    return functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents of this height and width from their tokens; undoes ``to_tokens``."""
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def grid_positions(height: int, width: int, axes: int, device: torch.device) -> Tensor:
    """Positions (height * width, axes) of the tokens of an image: row and column on the second and the third axis."""
    positions = torch.zeros(height, width, axes, device=device)
    positions[..., 1] = torch.arange(height, device=device)[:, None]
    positions[..., 2] = torch.arange(width, device=device)
    return positions.flatten(0, 1)
