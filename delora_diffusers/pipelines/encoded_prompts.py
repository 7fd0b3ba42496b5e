"""Prompts encoded ahead of sampling, so that the text encoders do not need memory beside the denoiser."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.families.loading import OpenModel
from delora_diffusers.memory import free_bytes
from delora_diffusers.pipelines.adapted_pipeline import (
    AdaptedModel,
    Weighted,
    adapted_components,
    missing_component,
)
from delora_diffusers.pipelines.conditions import conditions, count_chunks, guided, joined, read_prompts
from delora_diffusers.pipelines.offload import offload_blocks


class EncodedPrompts:
    """The prompts of a run, encoded once for each set of adapters that changes the text encoders; kept on the CPU.

    Each prompt is encoded by itself, because the last bits of an embedding depend on its batch. One text encoder at a
    time is loaded. A prompt and the negative prompt are encoded in as many chunks as the longer one needs.

    Args:
        model: opened.
        adapters: every adapter that is used.
        prompts: each prompt with the adapters, and their strengths, with which it is used.
        negative_prompt: for all prompts; empty for none.
        max_chunks: as many chunks are read of a prompt, at most; see ``count_chunks``.

    Raises:
        InputError: an adapter adapts a text encoder that the model does not have.
    """

    def __init__(
        self,
        model: OpenModel,
        adapters: Sequence[Path],
        prompts: Iterable[tuple[str, Sequence[Weighted]]],
        negative_prompt: str,
        device: torch.device,
        dtype: torch.dtype,
        max_chunks: int = 1,
    ):
        self.model = model
        self.negative_prompt = negative_prompt or model.family.NO_PROMPT
        self._is_given = bool(negative_prompt)
        self._max_chunks = max_chunks
        adapted = [component for component in adapted_components(adapters) if component != model.family.DENOISER]
        missing = next((component for component in adapted if component not in model.skeletons), None)
        if missing is not None:
            raise missing_component(model.pipeline, missing, adapters)
        self._depends_on_adapters = bool(adapted)
        self._encoded: dict[Key, dict[str, Tensor]] = {}
        wanted = {
            self._key(text, self.chunks_of(prompt), weighted): weighted
            for prompt, weighted in prompts
            for text in (prompt, self.negative_prompt)
        }
        for name in model.text_encoders:
            encoder = load_text_encoder(model, name, dtype, device)
            switched = AdaptedModel(encoder, name, adapters) if name in adapted else None
            in_use: Sequence[Weighted] | None = None
            for key, weighted in wanted.items():
                if switched is not None and (in_use is None or list(in_use) != list(weighted)):
                    switched.use(weighted)
                    in_use = weighted
                with torch.no_grad():
                    outputs = read_prompts(model.pipeline, name, [key[0]], device, key[1])
                self._encoded.setdefault(key, {}).update({name: tensor.cpu() for name, tensor in outputs.items()})
            del encoder, switched
            model.drop(name)

    def _key(self, text: str, chunks: int, adapters: Sequence[Weighted]) -> "Key":
        return text, chunks, tuple(adapters) if self._depends_on_adapters else ()

    def chunks_of(self, prompt: str) -> int:
        """The chunks in which a prompt and the negative prompt are encoded."""
        return count_chunks(self.model.pipeline, [prompt, self.negative_prompt], self._max_chunks)

    def arguments(self, prompts: Sequence[str], adapters: Sequence[Weighted], device: torch.device) -> dict[str, Any]:
        """A batch of encoded prompts as arguments of the pipeline.

        Args:
            prompts: with the same number of chunks.
        """
        pipeline, config = self.model.pipeline, self.model.skeletons[self.model.family.DENOISER].config
        chunks = self.chunks_of(prompts[0])
        positive, negative = (
            conditions(pipeline, joined([self._encoded[self._key(text, chunks, adapters)] for text in texts]), config)
            for texts in (prompts, [self.negative_prompt] * len(prompts))
        )
        positive, negative = (
            {name: tensor.to(device) for name, tensor in tensors.items()} for tensors in (positive, negative)
        )
        return guided(pipeline, positive, negative, self._is_given)


Key = tuple[str, int, tuple[Weighted, ...]]
"""A text, and the number of chunks and the adapters with which it is encoded."""


def load_text_encoder(model: OpenModel, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a text encoder; if it does not fit the GPU, its blocks stay in host memory and are brought there in turn."""
    encoder = model.load(name, dtype)
    size = sum(parameter.nbytes for parameter in encoder.parameters())  # T5 keeps a part in float32
    if device.type != "cuda" or size * 1.1 < free_bytes():
        return encoder.to(device)
    offload_blocks(encoder, device)
    return encoder
