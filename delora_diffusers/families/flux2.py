"""FLUX.2, klein and dev: hidden states of three layers of a language model, and 2 x 2 patches of latents that are
normalized by the running statistics of the autoencoder's batch normalization. Dev's guidance input is 1 in training, as
Flux.1's."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.families.latents import LatentScale, grid_positions

PROMPT_TOKENS = 512


class Flux2(Family):
    AUTOENCODER = "AutoencoderKLFlux2"
    PATCH = 1  # the latents are patches
    TARGETS = (*Family.TARGETS, "to_qkv_mlp_proj", "attn.to_out")
    UNQUANTIZED = (
        *("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
        *("time_guidance_embed", "x_embedder", "context_embedder", "norm_out", "proj_out"),
    )
    GUIDANCE_SCALE = 4.0

    def has_negative_prompt(self, index: Mapping[str, Any]) -> bool:
        return index["_class_name"] == "Flux2KleinPipeline" and not index.get("is_distilled")

    def encode(
        self, pipeline: Any, name: str, prompts: Sequence[str], device: torch.device | str
    ) -> tuple[Tensor, ...]:
        return (pipeline.encode_prompt(list(prompts), device=device, max_sequence_length=PROMPT_TOKENS)[0],)

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        return getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer), PROMPT_TOKENS

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        return {"encoder_hidden_states": outputs["text_encoder"][0]}

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {"encoder_hidden_states": (PROMPT_TOKENS, config.joint_attention_dim)}

    def latent_shape(self, config: Any) -> tuple[int, int]:
        channels, factor = super().latent_shape(config)
        return 4 * channels, 2 * factor

    def scale(self, autoencoder: Any) -> LatentScale:
        statistics = autoencoder.bn
        std = (statistics.running_var + autoencoder.config.batch_norm_eps).sqrt()
        return LatentScale(1.0, statistics.running_mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1))

    def posterior(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().posterior(autoencoder, pixels)
        return functional.pixel_unshuffle(mean, 2), functional.pixel_unshuffle(std, 2)

    def decode(self, autoencoder: Any, latents: Tensor) -> Tensor:
        return super().decode(autoencoder, functional.pixel_shuffle(latents, 2))

    def unpacked(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        if latents.ndim == 3:
            return latents.transpose(1, 2).unflatten(2, (height, width))
        # Klein's pipeline returns the autoencoder's latents.
        return self.scale(pipeline.vae).scaled(functional.pixel_unshuffle(latents, 2))

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        text = conditions["encoder_hidden_states"]
        words = torch.zeros(text.shape[1], 4, device=noisy.device)
        words[:, 3] = torch.arange(text.shape[1], device=noisy.device)
        tokens = denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps,
            guidance=torch.ones_like(timesteps) if denoiser.config.guidance_embeds else None,
            img_ids=grid_positions(height, width, 4, noisy.device),
            txt_ids=words,
            **conditions,
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, (height, width))


FAMILY = Flux2()
