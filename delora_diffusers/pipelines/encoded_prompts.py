"""Prompts encoded ahead of sampling, so that the text encoders do not need memory beside the denoiser."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.families.loading import OpenModel
from delora_diffusers.pipelines.adapted_pipeline import (
    AdaptedModel,
    Weighted,
    adapted_component,
    adapted_components,
)
from delora_diffusers.pipelines.conditions import encode_prompts, guided


class EncodedPrompts:
    """The prompts of a run, encoded once for each set of adapters that changes the text encoders; kept on the CPU.

    Args:
        model: opened; its text encoders are loaded until ``finish``.
        adapters: every adapter that ``encode`` will be given.
        negative_prompt: for all prompts; empty for none.

    Raises:
        InputError: an adapter adapts a text encoder that the model does not have.
    """

    def __init__(
        self,
        model: OpenModel,
        adapters: Sequence[Path],
        negative_prompt: str,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.model = model
        self.negative_prompt = negative_prompt
        self.device = device
        for name in model.text_encoders:
            model.load(name, dtype, device)
        self._adapted = [
            AdaptedModel(adapted_component(model.pipeline, component, adapters), component, adapters)
            for component in adapted_components(adapters)
            if component != "unet"
        ]
        self._depends_on_adapters = bool(self._adapted)
        self._in_use: Sequence[Weighted] | None = None
        self._encoded: dict[tuple[str, tuple[Weighted, ...]], dict[str, Tensor]] = {}

    def encode(self, prompt: str, adapters: Sequence[Weighted]) -> None:
        """Encode a prompt, and the negative prompt, with these adapters; nothing is done twice.

        Each prompt is encoded by itself, because the last bits of an embedding depend on its batch.
        """
        for text in (prompt, self.negative_prompt):
            if self._key(text, adapters) in self._encoded:
                continue
            if self._in_use is None or list(self._in_use) != list(adapters):
                for adapted in self._adapted:
                    adapted.use(adapters)
                self._in_use = adapters
            with torch.no_grad():
                conditions = encode_prompts(self.model.pipeline, [text], self.device)
            self._encoded[self._key(text, adapters)] = {name: tensor.cpu() for name, tensor in conditions.items()}

    def _key(self, text: str, adapters: Sequence[Weighted]) -> tuple[str, tuple[Weighted, ...]]:
        return text, tuple(adapters) if self._depends_on_adapters else ()

    def finish(self) -> None:
        """Drop the text encoders."""
        self._adapted = []
        self.model.drop(*self.model.text_encoders)

    def arguments(self, prompts: Sequence[str], adapters: Sequence[Weighted], device: torch.device) -> dict[str, Any]:
        """A batch of encoded prompts as arguments of the pipeline."""
        positive, negative = (
            self._joined([self._encoded[self._key(text, adapters)] for text in texts], device)
            for texts in (prompts, [self.negative_prompt] * len(prompts))
        )
        return guided(self.model.pipeline, positive, negative, given=bool(self.negative_prompt))

    @staticmethod
    def _joined(rows: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
        return {name: torch.cat([row[name] for row in rows]).to(device) for name in rows[0]}
