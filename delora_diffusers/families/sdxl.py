"""Stable Diffusion XL: two CLIP text encoders, whose penultimate hidden states the UNet's cross-attention reads; the
pooled output of the second and the sizes of photo and crop are added to the timestep's embedding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.families.sd import FAMILY as SD
from delora_diffusers.families.sd import join_chunks, unsupported_unet
from delora_diffusers.methods.config import UNET_TARGETS


class StableDiffusionXL(Family):
    DENOISER = "unet"
    TEXT_ENCODERS = TRAINABLE_ENCODERS = ("text_encoder", "text_encoder_2")
    PATCH = 1
    IS_FLOW = False
    TARGETS = UNET_TARGETS
    UNQUANTIZED = SD.UNQUANTIZED
    CHUNKS_PROMPTS = True
    ARGUMENTS: Mapping[str, str] = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
    HAS_SIZES = True

    def unsupported(self, denoiser: Any, autoencoder: Any) -> str | None:
        embedding = getattr(denoiser, "addition_embed_type", None)
        if embedding != "text_time":
            return f"has a UNet with addition_embed_type {embedding}, which SDXL's pipeline does not support"
        scales = [getattr(autoencoder, name, None) is not None for name in ("latents_mean", "latents_std")]
        if any(scales) and not all(scales):
            return "has an autoencoder with latents_mean or latents_std, which a StableDiffusionXLPipeline ignores"
        channels = autoencoder.latent_channels
        if all(scales) and not len(autoencoder.latents_mean) == len(autoencoder.latents_std) == channels:
            return f"has an autoencoder with latents_mean or latents_std of other than {channels} values"
        return unsupported_unet(denoiser, autoencoder)

    def read(self, pipeline: Any, name: str, tokens: Tensor) -> tuple[Tensor, ...]:
        output = getattr(pipeline, name)(tokens.flatten(0, -2), output_hidden_states=True)
        # The pooled output is the first chunk's, as in AUTOMATIC1111, ComfyUI and sd-scripts.
        pooled = output[0].unflatten(0, (len(tokens), -1))[:, 0]
        return join_chunks(output.hidden_states[-2], len(tokens)), pooled

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        hidden = torch.cat([output[0] for output in outputs.values()], dim=-1)
        return {"encoder_hidden_states": hidden, "text_embeds": outputs["text_encoder_2"][1]}

    def guided(
        self, pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
    ) -> dict[str, Any]:
        """The base model was trained with zeros for an empty prompt, and its pipeline's configuration says so."""
        if not given and getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
            negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
        return super().guided(pipeline, prompts, negative, given)

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        hidden = conditions.pop("encoder_hidden_states")
        return denoiser(noisy, timesteps, hidden, added_cond_kwargs=conditions, return_dict=False)[0]


FAMILY = StableDiffusionXL()
