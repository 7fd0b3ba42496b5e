"""Flux.1: T5's hidden states, and CLIP's pooled output for the modulation. Guidance-distilled models, such as dev, take
the guidance scale as an input, which is 1 in training: the data are not guided."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.families.latents import from_tokens, grid_positions, to_tokens

T5_TOKENS = 512


class Flux(Family):
    TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
    TRAINABLE_ENCODERS = ("text_encoder",)
    PROMPT_LENGTHS: Mapping[str, int] = {"text_encoder_2": T5_TOKENS}
    UNQUANTIZED = ("time_text_embed", "x_embedder", "context_embedder", "norm_out")
    ARGUMENTS: Mapping[str, str] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }
    GUIDANCE_SCALE = 3.5

    def has_negative_prompt(self, index: Mapping[str, Any]) -> bool:
        return False

    def read(self, pipeline: Any, name: str, tokens: Tensor) -> tuple[Tensor, ...]:
        output = getattr(pipeline, name)(tokens)
        return (output.pooler_output if name == "text_encoder" else output[0],)

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer_2, T5_TOKENS

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": outputs["text_encoder_2"][0],
            "pooled_projections": outputs["text_encoder"][0],
        }

    def unpacked(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return from_tokens(latents, height, width)

    def prepare_to_train(self, denoiser: Any) -> None:
        for block in denoiser.single_transformer_blocks:
            block.attn.register_forward_hook(make_gradient_contiguous)

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        height, width = noisy.shape[-2:]
        text = conditions["encoder_hidden_states"]
        tokens = denoiser(
            hidden_states=to_tokens(noisy),
            timestep=timesteps,
            guidance=torch.ones_like(timesteps) if denoiser.config.guidance_embeds else None,
            img_ids=grid_positions(height // 2, width // 2, 3, noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            **conditions,
            return_dict=False,
        )[0]
        return from_tokens(tokens, height, width)


def make_gradient_contiguous(module: Any, inputs: Any, output: Tensor) -> None:
    """Give attention a contiguous gradient, where single blocks would pass a slice of a wider one.

    PyTorch keeps cuDNN's attention backward by the strides of q, k and v, and then runs it on gradients with any
    strides (torch 2.11, Hopper): wrong gradients, or an illegal memory access.
    """
    if output.requires_grad:
        output.register_hook(Tensor.contiguous)


FAMILY = Flux()
