"""Stable Diffusion XL: two CLIP text encoders, whose penultimate hidden states the UNet's cross-attention reads; the
pooled output of the second and the sizes of photo and crop are added to the timestep's embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
HAS_SIZES = True


def unsupported(unet: Any, vae: Any) -> str | None:
    if getattr(unet, "addition_embed_type", None) != "text_time":
        return f"has a UNet with addition_embed_type {unet.addition_embed_type}, which SDXL does not serve"
    scales = [getattr(vae, name, None) is not None for name in ("latents_mean", "latents_std")]
    if any(scales) and not all(scales):
        return "has an autoencoder with latents_mean or latents_std, which a StableDiffusionXLPipeline ignores"
    if all(scales) and not len(vae.latents_mean) == len(vae.latents_std) == vae.latent_channels:
        return f"has an autoencoder with latents_mean or latents_std of other than {vae.latent_channels} values"
    return None


def encode_tokens(pipeline: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs = [getattr(pipeline, name)(ids, output_hidden_states=True) for name, ids in tokens.items()]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": hidden, "text_embeds": outputs[-1][0]}


def guided(
    pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
) -> dict[str, Tensor]:
    """The base model was trained with zeros for an empty prompt, and its pipeline's configuration says so."""
    if not given and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
    return {
        "prompt_embeds": prompts["encoder_hidden_states"],
        "negative_prompt_embeds": negative["encoder_hidden_states"],
        "pooled_prompt_embeds": prompts["text_embeds"],
        "negative_pooled_prompt_embeds": negative["text_embeds"],
    }


def predict(
    unet: Any,
    noisy: Tensor,
    timesteps: Tensor,
    *,
    encoder_hidden_states: Tensor,
    text_embeds: Tensor,
    time_ids: Tensor,
) -> Tensor:
    added = {"text_embeds": text_embeds, "time_ids": time_ids}
    return unet(noisy, timesteps, encoder_hidden_states, added_cond_kwargs=added, return_dict=False)[0]
