"""The families, and the interface that each one's file implements."""

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from torch import Tensor

from delora_diffusers.names import SD_PIPELINE, SDXL_PIPELINE

FAMILIES = {SD_PIPELINE: "sd", SDXL_PIPELINE: "sdxl"}
"""The file in this folder by the class of the pipeline."""


class Family(Protocol):
    """What differs between model families. A pipeline's models are those of diffusers' pipeline of the family."""

    TEXT_ENCODERS: tuple[str, ...]
    """The components that read prompts, in the order of their outputs."""
    HAS_SIZES: bool
    """Whether the denoiser takes the size of the photo and the position of the crop (SDXL's ``time_ids``)."""

    def unsupported(self, unet: Any, vae: Any) -> str | None:
        """What the configurations of these models ask for that the family's pipeline ignores; None if nothing."""
        ...

    def encode_tokens(self, pipeline: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The denoiser's conditions by name, (prompts, ...) each, from each text encoder's tokens (prompts, length)."""
        ...

    def guided(
        self, pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
    ) -> dict[str, Tensor]:
        """Encoded prompts and negative prompts as arguments of the pipeline.

        Args:
            given: whether the user gave negative prompts; otherwise they are empty.
        """
        ...

    def predict(self, unet: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The denoiser's prediction (batch, channels, height, width) for noisy latents, in the denoiser's dtype."""
        ...


@functools.cache
def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline class."""
    return cast(Family, importlib.import_module(f"{__package__}.{FAMILIES[pipeline_class]}"))
