"""Sample images from a pipeline, one seed per image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from delora_diffusers.adapter.control import as_signal, attached_control
from delora_diffusers.errors import InputError
from delora_diffusers.pipelines.autoencoder import decode


@torch.no_grad()
def sample_images(
    pipeline,
    seeds: Sequence[int],
    resolution: int | None,
    *,
    maps: Sequence[np.ndarray] | None = None,
    **arguments: Any,
) -> list[Image.Image]:
    """Sample a batch of images, one per seed. Each image's noise is sampled on the CPU from its seed alone.

    The autoencoder decodes in its own dtype, which may be wider than the UNet's.

    Args:
        pipeline: a ``StableDiffusionPipeline`` or ``StableDiffusionXLPipeline``.
        seeds: one per prompt (or embedding) in ``arguments``.
        resolution: side length in pixels; None for the model's default, or for that of the maps.
        maps: one per seed, all of the same size, for a UNet with a control signal.
        arguments: for the pipeline: ``prompt`` or ``prompt_embeds``, ``num_inference_steps``, ``guidance_scale``, ...

    Raises:
        InputError: the UNet overflows in its dtype; the image would be black.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    height = width = resolution
    control = attached_control(pipeline.unet)
    if control is not None and maps is not None:
        signal = as_signal(maps, control.palette)
        if resolution is None:
            height, width = signal.shape[-2:]
        control.encoder.to(pipeline.unet.device)
        control.see(signal.to(pipeline.unet.device, next(control.encoder.parameters()).dtype))
    latents = pipeline(generator=generators, height=height, width=width, output_type="latent", **arguments).images
    if control is not None:
        control.see(None)
    if not torch.isfinite(latents).all():
        dtype = str(pipeline.unet.dtype)[6:]
        remedy = "use --mixed_precision bf16 or no, or a smaller" if dtype == "float16" else "use a smaller"
        raise InputError(
            f"the UNet gave values that are not finite in {dtype}; {remedy} --strength or --guidance_scale."
        )
    return pipeline.image_processor.postprocess(decode(pipeline.vae, latents), output_type="pil")
