"""Stable Diffusion 3 and 3.5: two CLIP text encoders and T5, which a model may lack, and a transformer that reads the
hidden states of all three one after another (Esser et al., ICML 2024)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delora_diffusers.families.family import Family, Outputs

T5_TOKENS = 256


class StableDiffusion3(Family):
    TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
    TRAINABLE_ENCODERS = ("text_encoder", "text_encoder_2")
    PROMPT_LENGTHS: Mapping[str, int] = {"text_encoder_3": T5_TOKENS}
    WEIGHTING_SCHEME = "logit_normal"
    UNQUANTIZED = ("time_text_embed", "context_embedder", "norm_out", "proj_out")
    ARGUMENTS: Mapping[str, str] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }
    GUIDANCE_SCALE = 7.0

    def read(self, pipeline: Any, name: str, tokens: Tensor) -> tuple[Tensor, ...]:
        encoder = getattr(pipeline, name)
        if name == "text_encoder_3":
            return (encoder(tokens)[0],)
        output = encoder(tokens, output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        if pipeline.tokenizer_3 is None:
            return pipeline.tokenizer, pipeline.tokenizer.model_max_length
        return pipeline.tokenizer_3, T5_TOKENS

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        """CLIP's hidden states side by side, padded to T5's width, and T5's after them; zeros without T5."""
        hidden, pooled = (torch.cat([outputs[name][i] for name in self.TRAINABLE_ENCODERS], dim=-1) for i in range(2))
        hidden = functional.pad(hidden, (0, config.joint_attention_dim - hidden.shape[-1]))
        missing = (hidden.new_zeros(len(hidden), T5_TOKENS, config.joint_attention_dim),)
        (t5,) = outputs.get("text_encoder_3", missing)
        return {"encoder_hidden_states": torch.cat([hidden, t5], dim=1), "pooled_projections": pooled}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        return denoiser(hidden_states=noisy, timestep=timesteps * 1000, **conditions, return_dict=False)[0]


FAMILY = StableDiffusion3()
