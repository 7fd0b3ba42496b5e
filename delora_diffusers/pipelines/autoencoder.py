"""Encode and decode images; in tiles if an image is large or memory runs out."""

from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import InputError
from delora_diffusers.memory import is_out_of_memory
from delora_diffusers.pipelines.latents import latent_scale

PIXELS_AT_ONCE = 512 * 512
"""One image of this size, or several smaller ones, are encoded and decoded at a time: activations need much memory."""
TILED_FROM = 1536 * 1536
"""Pixels from which an image is always encoded and decoded in tiles."""
TILE = 512
"""Side of a tile in pixels. Neighbouring tiles overlap by a quarter and are blended."""


def encode(vae: Any, pixels: Tensor) -> Any:
    """The posterior of images (batch, 3, height, width), -1 to 1, in the autoencoder's dtype and on its device."""
    return _tiled_if_needed(vae, pixels.shape[-2] * pixels.shape[-1], lambda: vae.encode(pixels).latent_dist)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images (batch, 3, height, width) of the denoiser's latents; in float32 if the autoencoder overflows in its dtype.

    Raises:
        InputError: it overflows in float32 too.
    """
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # Stable Diffusion XL's autoencoder overflows in fp16
    decoded = _decode(vae, latents)
    if vae.dtype != torch.float32 and not torch.isfinite(decoded).all():
        vae.to(torch.float32)
        decoded = _decode(vae, latents)
    if not torch.isfinite(decoded).all():
        raise InputError("the autoencoder gave values that are not finite; use another base model.")
    return decoded


def _decode(vae: Any, latents: Tensor) -> Tensor:
    unscaled = latent_scale(vae).unscaled(latents.to(vae.dtype))
    pixels = latents.shape[-2] * latents.shape[-1] * _factor(vae) ** 2
    images = []
    for batch in unscaled.split(max(1, PIXELS_AT_ONCE // pixels)):
        images.append(_tiled_if_needed(vae, pixels, lambda batch=batch: vae.decode(batch, return_dict=False)[0]))
    return torch.cat(images)


def _factor(vae: Any) -> int:
    """How many times smaller latents are than images."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _tiled_if_needed(vae: Any, pixels: int, run: Any) -> Any:
    """Run the autoencoder; in tiles if the image is large, or else if memory runs out."""
    if pixels < TILED_FROM or not hasattr(vae, "enable_tiling"):
        try:
            return run()
        except RuntimeError as error:
            if not is_out_of_memory(error) or not hasattr(vae, "enable_tiling"):
                raise
        torch.cuda.empty_cache()  # outside the handler, whose traceback keeps the activations
    _set_tiles(vae)
    vae.enable_tiling()
    try:
        return run()
    finally:
        vae.disable_tiling()


def _set_tiles(vae: Any) -> None:
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // _factor(vae)
