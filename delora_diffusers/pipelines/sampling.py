"""Sample images from a pipeline, one seed per image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from delora_diffusers.adapter.control import as_signal, attached_control
from delora_diffusers.crops import Size
from delora_diffusers.errors import InputError
from delora_diffusers.pipelines.autoencoder import decode
from delora_diffusers.pipelines.conditions import family_in


@torch.no_grad()
def sample_images(
    pipeline,
    seeds: Sequence[int],
    size: Size | int | None,
    *,
    maps: Sequence[np.ndarray] | None = None,
    guidance_scale: float | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Sample a batch of images, one per seed. Each image's noise is sampled on the CPU from its seed alone.

    The autoencoder decodes in its own dtype, which may be wider than the denoiser's.

    Args:
        pipeline: of one of the families.
        seeds: one per prompt (or embedding) in ``arguments``.
        size: width and height, or the side of a square, in pixels; None for the model's default, or for that of the
            maps.
        maps: one per seed, all of the same size, for a UNet with a control signal.
        guidance_scale: None for the pipeline's default.
        arguments: for the pipeline: ``prompt`` or ``prompt_embeds``, ``num_inference_steps``, ...

    Raises:
        InputError: the denoiser overflows in its dtype; the image would be black.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    family = family_in(pipeline)
    denoiser = getattr(pipeline, family.DENOISER)
    control = attached_control(denoiser)
    if control is not None and maps is not None:
        signal = as_signal(maps, control.palette)
        size = size or (signal.shape[-1], signal.shape[-2])
        control.encoder.to(denoiser.device)
        control.see(signal.to(denoiser.device, next(control.encoder.parameters()).dtype))
    size = size or default_resolution(pipeline, denoiser)
    width, height = (size, size) if isinstance(size, int) else size
    if guidance_scale is not None:
        arguments[family.GUIDANCE] = guidance_scale
    latents = pipeline(generator=generators, height=height, width=width, output_type="latent", **arguments).images
    if control is not None:
        control.see(None)
    if not torch.isfinite(latents).all():
        dtype = str(denoiser.dtype)[6:]
        remedy = "use --mixed_precision bf16 or no, or a smaller" if dtype == "float16" else "use a smaller"
        raise InputError(
            f"the denoiser gave values that are not finite in {dtype}; {remedy} --strength or --guidance_scale."
        )
    latents = family.unpacked(pipeline, latents, *latent_size(pipeline, height, width))
    return pipeline.image_processor.postprocess(decode(family, pipeline.vae, latents), output_type="pil")


def default_resolution(pipeline: Any, denoiser: Any) -> int:
    """Side in pixels of the images that a pipeline samples by default."""
    size = getattr(denoiser.config, "sample_size", None) or getattr(pipeline, "default_sample_size", 128)
    return (size if isinstance(size, int) else size[0]) * pipeline.vae_scale_factor


def latent_size(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width of the latents of an image."""
    factor = family_in(pipeline).latent_shape(pipeline.vae.config)[1]
    return height // factor, width // factor
