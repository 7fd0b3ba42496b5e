"""Encode and decode images; in tiles if an image is large or memory runs out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.families.family import Family
from delora_diffusers.memory import is_out_of_memory

PIXELS_AT_ONCE = 512 * 512
"""One image of this size, or several smaller ones, are encoded and decoded at a time: activations need much memory."""
TILED_FROM = 1536
"""Side in pixels from which an image is always encoded and decoded in tiles."""
TILE = 512
"""Side of a tile in pixels; half of the image's if that is smaller. Neighbours overlap by a quarter and are blended."""


def encode(family: Family, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mean and standard deviation (batch, channels, height, width) of images (batch, 3, ...), -1 to 1,
    in the autoencoder's dtype and on its device."""
    side = max(pixels.shape[-2:])
    posteriors = [
        _tiled_if_needed(vae, side, lambda batch=batch: family.posterior(vae, batch))
        for batch in pixels.split(max(1, PIXELS_AT_ONCE // (pixels.shape[-2] * pixels.shape[-1])))
    ]
    means, stds = zip(*posteriors)
    return torch.cat(means), torch.cat(stds)


def decode(family: Family, vae: Any, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) of the denoiser's latents; in float32 if the autoencoder overflows in its dtype.

    Raises:
        InputError: it overflows in float32 too.
    """
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # Stable Diffusion XL's autoencoder overflows in fp16
    decoded = _decode(family, vae, latents)
    if vae.dtype != torch.float32 and not torch.isfinite(decoded).all():
        vae.to(torch.float32)
        decoded = _decode(family, vae, latents)
    if not torch.isfinite(decoded).all():
        raise InputError(
            "the autoencoder gave values that are not finite; give a lower --guidance_scale or --strength, or "
            "another base model."
        )
    return decoded


def _decode(family: Family, vae: Any, latents: Tensor) -> Tensor:
    unscaled = family.scale(vae).unscaled(latents.to(vae.dtype))
    factor = family.latent_shape(vae.config)[1]
    height, width = (size * factor for size in latents.shape[-2:])
    images = [
        _tiled_if_needed(vae, max(height, width), lambda batch=batch: family.decode(vae, batch))
        for batch in unscaled.split(max(1, PIXELS_AT_ONCE // (height * width)))
    ]
    return torch.cat(images)


def _tiled_if_needed(vae: Any, side: int, run: Callable[[], Any]) -> Any:
    """Run the autoencoder; in tiles if the longer side of the images is large, or else if memory runs out."""
    can_tile = hasattr(vae, "use_tiling")
    if side < TILED_FROM or not can_tile:
        try:
            return run()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not can_tile:
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the activations
    _set_tile(vae, TILE if side > TILE else side // 2)
    vae.enable_tiling()
    try:
        return run()
    finally:
        vae.disable_tiling()


def _set_tile(vae: Any, side: int) -> None:
    """Set the side of tiles in pixels, by whichever attributes the autoencoder has for it."""
    if hasattr(vae, "tile_latent_min_size"):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        vae.tile_latent_min_size = side // factor
        vae.tile_sample_min_size = vae.tile_latent_min_size * factor
    else:
        vae.tile_sample_min_height = vae.tile_sample_min_width = side
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = side * 3 // 4
