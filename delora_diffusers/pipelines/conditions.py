"""Prompts as conditions for the denoiser: the outputs of the text encoders."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from delora_diffusers.errors import printable
from delora_diffusers.families.family import Family
from delora_diffusers.families.table import family_of

logger = logging.getLogger(__name__)


def family_in(pipeline: Any) -> Family:
    """The family of a pipeline."""
    return family_of(type(pipeline).__name__)


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """The pipeline's text encoders that are loaded, by name."""
    encoders = {name: getattr(pipeline, name, None) for name in family_in(pipeline).TEXT_ENCODERS}
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def tokenize(
    pipeline: Any,
    prompts: Sequence[str],
    device: torch.device | str,
    names: Sequence[str] | None = None,
    chunks: int = 1,
) -> dict[str, Tensor]:
    """Token ids for text encoders by the encoder's name; see ``Family.tokenize``.

    Args:
        names: of the encoders; None for all that are loaded.
    """
    family = family_in(pipeline)
    names = list(text_encoders(pipeline)) if names is None else names
    return {name: family.tokenize(pipeline, name, prompts, chunks).to(device) for name in names}


def count_chunks(pipeline: Any, prompts: Sequence[str], most: int) -> int:
    """The chunks of CLIP's tokens in which the longest of these prompts is encoded, at most ``most``.

    A chunk has as many tokens as CLIP reads, 77, of which two mark its start and its end.
    """
    if most == 1:
        return 1
    tokenizer, longest = family_in(pipeline).prompt_limit(pipeline)
    return min(most, max(_chunks_of(tokenizer(prompt, verbose=False).input_ids, longest) for prompt in prompts))


def _chunks_of(ids: Sequence[int], longest: int) -> int:
    """The chunks that the token ids of a prompt fill, of which the first and the last mark its start and its end."""
    return max(1, math.ceil((len(ids) - 2) / (longest - 2)))


def read_prompts(
    pipeline: Any, name: str, prompts: Sequence[str], device: torch.device | str, chunks: int = 1
) -> dict[str, Tensor]:
    """The outputs of a text encoder that is loaded, (prompts, ...) each, as ``NAME/0``, ``NAME/1``, ...

    Args:
        chunks: in which all prompts are encoded; more than one only for families that have ``CHUNKS_PROMPTS``.
    """
    family = family_in(pipeline)
    if chunks == 1:
        outputs = family.encode(pipeline, name, prompts, device)
    else:
        outputs = family.read(pipeline, name, family.tokenize(pipeline, name, prompts, chunks).to(device))
    return {f"{name}/{number}": tensor for number, tensor in enumerate(outputs)}


def belongs_to_text_encoder(name: str) -> bool:
    """Whether a tensor of this name is a text encoder's: its tokens or one of its outputs."""
    return name.startswith("text_encoder")


def conditions(pipeline: Any, encoded: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The denoiser's conditions, (prompts, ...) each, by name; see the family.

    Args:
        encoded: the outputs of each text encoder, as ``read_prompts`` gives them, or its tokens, by its name; those are
            encoded.
        config: the denoiser's.
    """
    family = family_in(pipeline)
    outputs: dict[str, tuple[Tensor, ...]] = {}
    for name in family.TEXT_ENCODERS:
        if name in encoded:
            outputs[name] = family.read(pipeline, name, encoded[name])
        elif f"{name}/0" in encoded:
            outputs[name] = tuple(tensor for key, tensor in encoded.items() if key.startswith(f"{name}/"))
    return without_full_mask(family.conditions(outputs, config))


def without_full_mask(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conditions, without their mask if no prompt is padded."""
    mask = conditions.get("mask")
    if mask is None or not mask.all():
        return conditions
    return {name: tensor for name, tensor in conditions.items() if name != "mask"}


def first_chunks(conditions: dict[str, Tensor], kept: int, chunks: int) -> dict[str, Tensor]:
    """The conditions of prompts in the first ``kept`` of the ``chunks`` in which they are encoded."""
    if kept == chunks:
        return conditions
    hidden = conditions["encoder_hidden_states"]
    return conditions | {"encoder_hidden_states": hidden[:, : hidden.shape[1] // chunks * kept]}


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], device: torch.device | str, chunks: int = 1
) -> dict[str, Tensor]:
    """Encode prompts with all text encoders, which are loaded, in their dtype; see ``conditions``, ``read_prompts``."""
    encoded: dict[str, Tensor] = {}
    config = getattr(getattr(pipeline, family_in(pipeline).DENOISER), "config", None)
    for name in text_encoders(pipeline):
        encoded |= read_prompts(pipeline, name, prompts, device, chunks)
    return conditions(pipeline, encoded, config)


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several batches of prompts as one batch; shorter prompts are padded with zeros."""
    tensors = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: torch.cat(_padded(same)) for name, same in tensors.items()}


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    longest = max(tensor.shape[1] for tensor in tensors)
    missing = [longest - tensor.shape[1] for tensor in tensors]
    return [functional.pad(t, (*(0, 0) * (t.ndim - 2), 0, count)) if count else t for t, count in zip(tensors, missing)]


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
    prompts, negative = (
        {name: tensor.repeat(count, *[1] * (tensor.ndim - 1)) for name, tensor in conditions.items()}
        for conditions in (prompts, negative)
    )
    return family_in(pipeline).guided(pipeline, prompts, negative, given)


def warn_of_truncation(pipeline: Any, prompts: Sequence[str], chunks: int = 1) -> None:
    """Log the prompts that are longer than the text encoder reads, and what it does not read of the first.

    Args:
        chunks: at most as many are read of a prompt.
    """
    family = family_in(pipeline)
    tokenizer, longest = family.prompt_limit(pipeline)
    most = chunks * (longest - 2) + 2
    cut = [(prompt, ids) for prompt in prompts if len(ids := tokenizer(prompt, verbose=False).input_ids) > most]
    if cut:
        prompt, ids = cut[0]
        unread = tokenizer.decode(ids[most - 1 :], skip_special_tokens=True)
        more = f"; {len(cut) - 1} more prompts are too long" if len(cut) > 1 else ""
        if family.CHUNKS_PROMPTS:
            more += f"; use --max_prompt_chunks {max(_chunks_of(ids, longest) for _, ids in cut)} to read everything"
        message = f"truncated: the prompt {shortened(prompt)!r} has {len(ids)} tokens, of which {most} are read"
        logger.warning(printable(f"{message}; not read: {shortened(unread)!r}{more}."))


def shortened(text: str, longest: int = 100) -> str:
    """The start of a text."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
