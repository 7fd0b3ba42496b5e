"""What differs between model families: the interface, with what most of them share as its defaults."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from delora_diffusers.families.latents import LatentScale, configured_scale
from delora_diffusers.methods.config import UNET_TARGETS

Outputs = Mapping[str, tuple[Tensor, ...]]
"""The tensors that each text encoder gives for prompts, (prompts, ...) each, by the encoder's name."""


class Family(Protocol):
    """A model family. Pipelines and their models are diffusers'.

    Wherever there are conditions, one that is named ``mask`` is (prompts, tokens), 1 for tokens of the prompt and 0 for
    padding. It is left out if no prompt is padded.
    """

    DENOISER: str = "transformer"
    """The component that is trained."""
    TEXT_ENCODERS: tuple[str, ...] = ("text_encoder",)
    """The components that read prompts; a model may lack those after the first."""
    TRAINABLE_ENCODERS: tuple[str, ...] = ()
    """The CLIP encoders, which ``--train_text_encoder`` adapts."""
    PROMPT_LENGTHS: Mapping[str, int] = {}
    """Tokens that an encoder reads, if its tokenizer does not set it."""
    AUTOENCODER: str = "AutoencoderKL"
    """The class of an autoencoder that can be trained on."""
    PATCH: int = 2
    """Side of the denoiser's patches: the height and width of latents must be multiples of it."""
    IS_FLOW: bool = True
    """Whether the denoiser predicts the velocity of a rectified flow; otherwise the noise or v of a DDPM."""
    WEIGHTING_SCHEME: str = "none"
    """Default of ``--weighting_scheme``, for flows."""
    TARGETS: tuple[str, ...] = (*UNET_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    """Modules that are adapted by default: the projections of attention, here with those of text in joint attention."""
    UNQUANTIZED: tuple[str, ...] = ()
    """Parts of names of modules that a quantized base keeps in the training precision."""
    GUIDANCE: str = "guidance_scale"
    """The pipeline's argument for the guidance scale."""
    GUIDANCE_SCALE: float = 7.5
    """Its default."""
    CHUNKS_PROMPTS: bool = False
    """Whether prompts that are longer than CLIP reads are encoded in chunks, with ``--max_prompt_chunks``."""
    PADS_PROMPTS: bool = True
    """Whether all prompts have the same number of tokens; otherwise the denoiser computes each at its own length."""
    ARGUMENTS: Mapping[str, str] = {"encoder_hidden_states": "prompt_embeds"}
    """The pipeline's arguments by the names of the conditions; those of negative prompts begin with ``negative_``."""
    NO_PROMPT: str = ""
    """The prompt that stands for none, in classifier-free guidance."""
    HAS_SIZES: bool = False
    """Whether the denoiser takes the size of the photo and the position of the crop (SDXL's ``time_ids``)."""

    def unsupported(self, denoiser: Any, autoencoder: Any) -> str | None:
        """What these models' configurations ask for that the family's pipeline ignores; None if nothing."""
        return None

    def has_negative_prompt(self, index: Mapping[str, Any]) -> bool:
        """Whether a negative prompt has an effect.

        Args:
            index: the pipeline's ``model_index.json``.
        """
        return True

    def tokenize(self, pipeline: Any, name: str, prompts: Sequence[str], chunks: int = 1) -> Tensor:
        """Token ids for a text encoder that reads prompts as they are, (prompts, tokens).

        Args:
            chunks: if more than one, the ids are (prompts, chunks, tokens). Each chunk has its own start and end token
                and padding. Shorter prompts are padded with empty chunks, longer ones are truncated.
        """
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        length = self.PROMPT_LENGTHS.get(name, tokenizer.model_max_length)
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        if chunks == 1:
            return tokenizer(list(prompts), return_tensors="pt", **padded).input_ids
        empty = tokenizer("", **padded).input_ids
        rows = (tokenizer(prompt, return_overflowing_tokens=True, **padded).input_ids for prompt in prompts)
        return torch.tensor([[*row, *[empty] * chunks][:chunks] for row in rows])

    def read(self, pipeline: Any, name: str, tokens: Tensor) -> tuple[Tensor, ...]:
        """A text encoder's output for token ids, see ``tokenize``; not of families that override ``encode``."""
        raise TypeError(f"{type(self).__name__} reads no token ids")

    def encode(
        self, pipeline: Any, name: str, prompts: Sequence[str], device: torch.device | str
    ) -> tuple[Tensor, ...]:
        """A text encoder's output for prompts, (prompts, ...) each."""
        return self.read(pipeline, name, self.tokenize(pipeline, name, prompts).to(device))

    def prompt_limit(self, pipeline: Any) -> tuple[Any, int]:
        """The tokenizer of the encoder that reads most of a prompt, and how many tokens that is."""
        return pipeline.tokenizer, pipeline.tokenizer.model_max_length

    def conditions(self, outputs: Outputs, config: Any) -> dict[str, Tensor]:
        """The denoiser's conditions by name, (prompts, ...) each, from the outputs of all text encoders.

        Args:
            config: the denoiser's.
        """
        ...

    def condition_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the conditions of a prompt; empty if ``read`` can tell them."""
        return {}

    def guided(
        self, pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor], given: bool
    ) -> dict[str, Any]:
        """Conditions of prompts and of negative prompts as arguments of the pipeline.

        Args:
            given: whether the user gave negative prompts; otherwise they are ``NO_PROMPT``.
        """
        both = {"": prompts, "negative_": negative}
        if not self.has_negative_prompt({**pipeline.config, "_class_name": type(pipeline).__name__}):
            del both["negative_"]
        return {
            prefix + argument: conditions.get(name)
            for name, argument in self.ARGUMENTS.items()
            for prefix, conditions in both.items()
        }

    def latent_shape(self, config: Any) -> tuple[int, int]:
        """Channels of the latents that the denoiser is trained on, and pixels per latent along a side.

        Args:
            config: the autoencoder's.
        """
        return config.latent_channels, 2 ** (len(config.block_out_channels) - 1)

    def scale(self, autoencoder: Any) -> LatentScale:
        """The scale between the posterior and the denoiser's latents."""
        return configured_scale(autoencoder.config)

    def posterior(self, autoencoder: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (batch, channels, height, width) of images (batch, 3, ...), -1 to 1."""
        distribution = autoencoder.encode(pixels).latent_dist
        return distribution.mean, distribution.std

    def decode(self, autoencoder: Any, latents: Tensor) -> Tensor:
        """Images (batch, 3, ...) of unscaled latents."""
        return autoencoder.decode(latents, return_dict=False)[0]

    def unpacked(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """The denoiser's latents of this height and width from what the pipeline returns as latents."""
        return latents

    def prepare_to_train(self, denoiser: Any) -> None:
        """Change what must be changed in a denoiser before it is trained."""

    def predict(self, denoiser: Any, noisy: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        """The denoiser's prediction (batch, channels, height, width), in its dtype.

        Args:
            timesteps: (batch,), of a DDPM an index, of a flow the time from 0, the image, to 1, the noise.
        """
        ...
