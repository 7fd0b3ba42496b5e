"""Draw pictures from a pipeline, each from a seed of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


@torch.no_grad()
def sample_pictures(pipeline, seeds: Sequence[int], resolution: int | None, **arguments: Any) -> list[Image.Image]:
    """One batch: a picture for each seed, whose noise is drawn on the CPU from that seed alone.

    The autoencoder decodes in its own dtype, which may be wider than the UNet's.

    Args:
        pipeline: a ``StableDiffusionPipeline``.
        seeds: one for each prompt (or embedding) given in ``arguments``.
        resolution: side of the pictures, pixels; None for the model's own.
        arguments: for the pipeline: ``prompt`` or ``prompt_embeds``, ``num_inference_steps``, ``guidance_scale``, ...
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        generator=generators, height=resolution, width=resolution, output_type="latent", **arguments
    ).images
    vae = pipeline.vae
    decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type="pil")
