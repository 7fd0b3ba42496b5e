"""Z-Image: a single-stream transformer that reads a language model's hidden states of each prompt's own tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from delora_diffusers.families.family import Family, Outputs
from delora_diffusers.methods.config import UNET_TARGETS

PROMPT_TOKENS = 512


class ZImage(Family):
    TARGETS = UNET_TARGETS
    UNQUANTIZED = ("t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer", "adaLN_modulation")
    GUIDANCE_SCALE = 5.0
    PADS_PROMPTS = False

    def encode(
        self, pipeline: Any, name: str, prompts: Sequence[str], device: torch.device | str
    ) -> tuple[Tensor, ...]:
        embeddings, _ = pipeline.encode_prompt(
            list(prompts), device=device, do_classifier_free_guidance=False, max_sequence_length=PROMPT_TOKENS
        )
        masks = [torch.ones(len(tokens), dtype=torch.long, device=tokens.device) for tokens in embeddings]
        return pad_sequence(embeddings, batch_first=True), pad_sequence(masks, batch_first=True)

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, PROMPT_TOKENS

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        embeddings, mask = outputs["text_encoder"]
        return {"cap_feats": embeddings, "mask": mask}

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        return {"cap_feats": (64, config.cap_feat_dim)}

    def guided(
        self, pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
    ) -> dict[str, Any]:
        return {"prompt_embeds": ragged(**prompts), "negative_prompt_embeds": ragged(**negative)}

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The transformer counts time from the noise to the image, and predicts the negative velocity."""
        frames = list(noisy.unsqueeze(2).unbind())
        predicted = denoiser(frames, 1 - timesteps, ragged(**conditions), return_dict=False)[0]
        return -torch.stack(predicted).squeeze(2)


def ragged(cap_feats: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Each prompt's embedding (tokens, width) without its padding."""
    if mask is None:
        return list(cap_feats.unbind())
    return [tokens[:length] for tokens, length in zip(cap_feats, mask.sum(dim=1).tolist())]


FAMILY = ZImage()
