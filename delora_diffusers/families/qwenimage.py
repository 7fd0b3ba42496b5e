"""Qwen-Image: a language model's hidden states of each prompt's own tokens, a video autoencoder of which one frame is
used, and classifier-free guidance by ``true_cfg_scale``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.families.latents import from_tokens, to_tokens

PROMPT_TOKENS = 512


class QwenImage(Family):
    AUTOENCODER = "AutoencoderKLQwenImage"
    UNQUANTIZED = ("time_text_embed", "img_in", "txt_in", "norm_out", "proj_out")
    ARGUMENTS: Mapping[str, str] = {"encoder_hidden_states": "prompt_embeds", "mask": "prompt_embeds_mask"}
    GUIDANCE = "true_cfg_scale"
    GUIDANCE_SCALE = 4.0
    NO_PROMPT = " "
    PADS_PROMPTS = False

    def encode(
        self, pipeline: Any, name: str, prompts: Sequence[str], device: torch.device | str
    ) -> tuple[Tensor, ...]:
        embeddings, mask = pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=PROMPT_TOKENS)
        return embeddings, torch.ones_like(embeddings[..., 0], dtype=torch.long) if mask is None else mask

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, PROMPT_TOKENS

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        embeddings, mask = outputs["text_encoder"]
        return {"encoder_hidden_states": embeddings, "mask": mask}

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (64, config.joint_attention_dim)}

    def latent_shape(self, config: Any) -> tuple[int, int]:
        return config.z_dim, 2 ** len(config.temperal_downsample)

    def posterior(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().posterior(autoencoder, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def decode(self, autoencoder: Any, latents: Tensor) -> Tensor:
        return super().decode(autoencoder, latents.unsqueeze(2)).squeeze(2)

    def unpacked(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return from_tokens(latents, height, width)

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = denoiser(
            hidden_states=to_tokens(noisy),
            timestep=timesteps,
            encoder_hidden_states=conditions["encoder_hidden_states"],
            encoder_hidden_states_mask=conditions.get("mask"),
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return from_tokens(tokens, height, width)


FAMILY = QwenImage()
