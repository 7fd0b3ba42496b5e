"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention to its last hidden states."""

from typing import Any

from torch import Tensor

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.methods.config import UNET_TARGETS


class StableDiffusion(Family):
    DENOISER = "unet"
    TRAINABLE_ENCODERS = ("text_encoder",)
    PATCH = 1
    IS_FLOW = False
    TARGETS = UNET_TARGETS
    UNQUANTIZED = ("time_embedding", "time_emb_proj", "add_embedding", "proj_in", "proj_out")
    CHUNKS_PROMPTS = True

    def unsupported(self, denoiser: Any, autoencoder: Any) -> str | None:
        embedding = getattr(denoiser, "addition_embed_type", None)
        if embedding is not None:
            return f"has a UNet with addition_embed_type {embedding}, which its pipeline does not support"
        if any(getattr(autoencoder, name, None) is not None for name in ("latents_mean", "latents_std")):
            return "has an autoencoder with latents_mean or latents_std, which a StableDiffusionPipeline ignores"
        return unsupported_unet(denoiser, autoencoder)

    def read(self, pipeline: Any, name: str, tokens: Tensor) -> tuple[Tensor, ...]:
        return (join_chunks(pipeline.text_encoder(tokens.flatten(0, -2))[0], len(tokens)),)

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        return {"encoder_hidden_states": outputs["text_encoder"][0]}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        return denoiser(noisy, timesteps, **conditions, return_dict=False)[0]


def join_chunks(hidden: Tensor, prompts: int) -> Tensor:
    """The hidden states of each prompt's chunks one after another, (prompts, chunks * tokens, width).

    Start and end tokens of every chunk are kept, as the user interfaces AUTOMATIC1111 (modules/sd_hijack_clip.py) and
    ComfyUI (comfy/sd1_clip.py) do; kohya's sd-scripts drop those between chunks (library/strategy_sd.py).

    Args:
        hidden: (prompts * chunks, tokens, width).
    """
    return hidden.reshape(prompts, -1, hidden.shape[-1])


def unsupported_unet(unet: Any, autoencoder: Any) -> str | None:
    """What the configurations of Stable Diffusion's models, XL's too, may not ask for."""
    if unet.in_channels != autoencoder.latent_channels:
        return f"has a UNet with {unet.in_channels} input channels for {autoencoder.latent_channels} latent channels"
    if not isinstance(getattr(autoencoder, "scaling_factor", None), int | float):
        factor = getattr(autoencoder, "scaling_factor", None)
        return f"has an autoencoder with scaling_factor {factor}, which is not a number"
    if getattr(autoencoder, "shift_factor", None):
        shift = autoencoder.shift_factor
        return f"has an autoencoder with shift_factor {shift}, which a Stable Diffusion pipeline ignores"
    for name in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if getattr(unet, name, None) is not None:
            return f"has a UNet with {name} {getattr(unet, name)}, which needs other inputs than a prompt"
    return None


FAMILY = StableDiffusion()
