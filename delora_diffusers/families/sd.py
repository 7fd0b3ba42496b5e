"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention to its last hidden states."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

TEXT_ENCODERS = ("text_encoder",)
HAS_SIZES = False


def unsupported(unet: Any, vae: Any) -> str | None:
    if getattr(unet, "addition_embed_type", None) is not None:
        return f"has a UNet with addition_embed_type {unet.addition_embed_type}, which Stable Diffusion does not serve"
    if any(getattr(vae, name, None) is not None for name in ("latents_mean", "latents_std")):
        return "has an autoencoder with latents_mean or latents_std, which a StableDiffusionPipeline ignores"
    return None


def encode_tokens(pipeline: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"encoder_hidden_states": pipeline.text_encoder(tokens["text_encoder"])[0]}


def guided(
    pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
) -> dict[str, Tensor]:
    return {
        "prompt_embeds": prompts["encoder_hidden_states"],
        "negative_prompt_embeds": negative["encoder_hidden_states"],
    }


def predict(unet: Any, noisy: Tensor, timesteps: Tensor, *, encoder_hidden_states: Tensor) -> Tensor:
    return unet(noisy, timesteps, encoder_hidden_states, return_dict=False)[0]
