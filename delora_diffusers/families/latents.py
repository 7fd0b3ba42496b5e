"""The scale between an autoencoder's latents and those that the UNet is trained on."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LatentScale:
    """``(x - mean) / std * factor``; most autoencoders have a factor only.

    Attributes:
        factor: ``scaling_factor``. mean, std: of each channel, (1, channels, 1, 1), or None.
    """

    factor: float
    mean: Tensor | None = None
    std: Tensor | None = None

    def scaled(self, latents: Tensor) -> Tensor:
        """The UNet's latents (batch, channels, height, width) from the autoencoder's."""
        if self.mean is None or self.std is None:
            return latents * self.factor
        return (latents - self.mean.to(latents)) * self.factor / self.std.to(latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents from the UNet's."""
        if self.mean is None or self.std is None:
            return latents / self.factor
        return latents * self.std.to(latents) / self.factor + self.mean.to(latents)


def latent_scale(vae: Any) -> LatentScale:
    """The scale that an autoencoder's configuration gives, as Stable Diffusion XL's pipeline reads it."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return LatentScale(vae.config.scaling_factor)
    return LatentScale(vae.config.scaling_factor, *(torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std)))
