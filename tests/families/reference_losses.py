"""The training loss of each transformer family, written out on its own to check ours against.

All are rectified flow (Liu et al., arXiv 2209.03003; Esser et al., arXiv 2403.03206): the model sees
``x = (1 - sigma) * latents + sigma * noise`` and regresses the velocity ``noise - latents``. What differs is how
latents are normalised and packed into tokens, how positions and time are given, and how prompts are encoded. The
sources are diffusers' ``examples/dreambooth/train_dreambooth_lora_*.py``, with ``*`` one of sd3, flux, flux2,
flux2_klein, z_image and qwen_image.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

TRAINING_GUIDANCE = 1.0
"""What a model distilled with embedded guidance is given in training, so that it keeps following its guidance input.

Diffusers' scripts default to 3.5.
"""


def reference_latents(kind: str, pipeline: Any, pixels: Tensor) -> Tensor:
    """The normalised latents of images: the means of the autoencoder's posterior.

    Args:
        kind: one of ``data.tiny_pipelines.KINDS``.
        pixels: (batch, 3, height, width), float32 in -1..1.

    Returns:
        (batch, channels, height / 8, width / 8); for FLUX.2 (batch, 4 * channels, height / 16, width / 16).
    """
    vae = pipeline.vae
    if kind == "qwenimage":  # a video autoencoder: images are videos of one frame
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = (channels(torch.tensor(values)) for values in (vae.config.latents_mean, vae.config.latents_std))
        return (latents - mean) / std
    latents = vae.encode(pixels).latent_dist.mode()
    if kind.startswith("flux2"):  # normalised after patching, by the statistics of a batch norm
        variance = vae.bn.running_var + vae.config.batch_norm_eps
        return (pixel_unshuffle(latents, 2) - channels(vae.bn.running_mean)) / channels(variance).sqrt()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def reference_loss(
    kind: str, pipeline: Any, pixels: Tensor, noise: Tensor, sigmas: Tensor, prompts: Sequence[str]
) -> Tensor:
    """The unweighted mean squared error of the predicted velocity, of each sample.

    Args:
        kind: one of ``data.tiny_pipelines.KINDS``.
        pixels: (batch, 3, height, width), float32 in -1..1.
        noise: as ``reference_latents`` returns.
        sigmas: (batch,) in 0..1, the noise levels.
        prompts: one per image.

    Returns:
        (batch,), float32.
    """
    latents = reference_latents(kind, pipeline, pixels)
    level = sigmas[:, None, None, None]
    noisy = (1 - level) * latents + level * noise
    velocity = VELOCITIES[kind](pipeline, noisy, sigmas, list(prompts))
    return (velocity.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3))


def channels(values: Tensor) -> Tensor:
    """Shape (channels,) as (1, channels, 1, 1)."""
    return values[None, :, None, None]


def tokens(grid: Tensor) -> Tensor:
    """Shape (batch, channels, height, width) as (batch, height * width, channels), row by row."""
    return grid.flatten(2).transpose(1, 2)


def grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``tokens``."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def positions(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The row and the column of each token, each (height * width,)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rows.flatten(), columns.flatten()


def guidance(pipeline: Any, sigmas: Tensor) -> Tensor | None:
    return torch.full_like(sigmas, TRAINING_GUIDANCE) if pipeline.transformer.config.guidance_embeds else None


def sd3(pipeline: Any, noisy: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=256
    )
    return pipeline.transformer(
        hidden_states=noisy,
        timestep=1000 * sigmas,
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


def flux(pipeline: Any, noisy: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
    embeddings, pooled, text_positions = pipeline.encode_prompt(prompt=prompts, prompt_2=None, max_sequence_length=512)
    patches = pixel_unshuffle(noisy, 2)
    height, width = patches.shape[-2:]
    rows, columns = positions(height, width)
    predicted = pipeline.transformer(
        hidden_states=tokens(patches),
        timestep=sigmas,
        guidance=guidance(pipeline, sigmas),
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        txt_ids=text_positions,
        img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(noisy),
        return_dict=False,
    )[0]
    return pixel_shuffle(grid(predicted, height, width), 2)


def flux2(pipeline: Any, noisy: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
    embeddings, text_positions = pipeline.encode_prompt(prompt=prompts, max_sequence_length=512)
    batch, _, height, width = noisy.shape
    rows, columns = positions(height, width)
    zeros = torch.zeros_like(rows)
    predicted = pipeline.transformer(
        hidden_states=tokens(noisy),
        timestep=sigmas,
        guidance=guidance(pipeline, sigmas),
        encoder_hidden_states=embeddings,
        txt_ids=text_positions,
        img_ids=torch.stack([zeros, rows, columns, zeros], dim=1).expand(batch, -1, -1),
        return_dict=False,
    )[0]
    return grid(predicted, height, width)


def zimage(pipeline: Any, noisy: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
    # Embeddings are a list, because prompts differ in length. The time runs from noise at 0 to the image at 1, and the
    # model predicts the velocity in that direction.
    embeddings, _ = pipeline.encode_prompt(
        prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=512
    )
    images = [latents[:, None] for latents in noisy]  # (channels, frames, height, width)
    predicted = pipeline.transformer(images, 1 - sigmas, embeddings, return_dict=False)[0]
    return -torch.stack([latents[:, 0] for latents in predicted])


def qwenimage(pipeline: Any, noisy: Tensor, sigmas: Tensor, prompts: list[str]) -> Tensor:
    embeddings, mask = pipeline.encode_prompt(prompt=prompts, max_sequence_length=512)
    patches = pixel_unshuffle(noisy, 2)
    batch, _, height, width = patches.shape
    predicted = pipeline.transformer(
        hidden_states=tokens(patches),
        timestep=sigmas,
        encoder_hidden_states=embeddings,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height, width)]] * batch,
        return_dict=False,
    )[0]
    return pixel_shuffle(grid(predicted, height, width), 2)


VELOCITIES = {
    "sd3": sd3,
    "sd3-no-t5": sd3,
    "flux": flux,
    "flux-schnell": flux,
    "flux2-klein": flux2,
    "flux2-dev": flux2,
    "zimage": zimage,
    "qwenimage": qwenimage,
}
