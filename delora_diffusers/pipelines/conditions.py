"""Prompts as conditions for the denoiser: the outputs of the text encoders."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import printable
from delora_diffusers.families.table import family_of

logger = logging.getLogger(__name__)


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """The pipeline's text encoders that are loaded, by name."""
    encoders = {name: getattr(pipeline, name, None) for name in family_of(type(pipeline).__name__).TEXT_ENCODERS}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def tokenize(pipeline: Any, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """Token ids for each text encoder, (prompts, tokens), by the encoder's name."""
    tokens = {}
    for name in text_encoders(pipeline):
        tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
        padded = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        tokens[name] = tokenizer(list(prompts), return_tensors="pt", **padded).input_ids.to(device)
    return tokens


def warn_of_truncation(pipeline: Any, prompts: Sequence[str]) -> None:
    """Log the prompts that are longer than the text encoder reads, and what it does not read of the first."""
    tokenizer = pipeline.tokenizer
    longest = tokenizer.model_max_length
    cut = [(prompt, ids) for prompt in prompts if len(ids := tokenizer(prompt, verbose=False).input_ids) > longest]
    if cut:
        prompt, ids = cut[0]
        unread = tokenizer.decode(ids[longest - 1 :], skip_special_tokens=True)
        more = f"; {len(cut) - 1} more prompts are too long" if len(cut) > 1 else ""
        message = f"truncated: the prompt {shortened(prompt)!r} has {len(ids)} tokens, of which {longest} are read"
        logger.warning(printable(f"{message}; not read: {shortened(unread)!r}{more}."))


def shortened(text: str, longest: int = 100) -> str:
    """The start of a text."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def encode_tokens(pipeline: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encode prompts as the denoiser's conditions, (prompts, ...) each, by name; see the family."""
    return family_of(type(pipeline).__name__).encode_tokens(pipeline, tokens)


def encode_prompts(pipeline: Any, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """Encode prompts in the text encoders' dtype; see ``encode_tokens``."""
    return encode_tokens(pipeline, tokenize(pipeline, prompts, device))


def guided(
    pipeline: Any,
    prompts: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    given: bool = False,
    count: int = 1,
) -> dict[str, Any]:
    """Encoded prompts and negative prompts as arguments of the pipeline.

    Args:
        given: whether the user gave the negative prompts; otherwise they are empty.
        count: images per prompt; each prompt is repeated as a whole batch.
    """
    arguments = family_of(type(pipeline).__name__).guided(pipeline, prompts, negative, given)
    return {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in arguments.items()}
