"""Prompts as conditions for the UNet: the outputs of the text encoders of Stable Diffusion 1.x, 2.x and XL."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from delora_diffusers.errors import printable
from delora_diffusers.names import is_xl

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def text_encoders(pipeline: Any) -> dict[str, Any]:
    """The pipeline's text encoders by name."""
    encoders = {name: getattr(pipeline, name, None) for name in TEXT_ENCODERS}
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
    """Log the captions that are longer than the text encoder reads, and what it does not read of the first."""
    tokenizer = pipeline.tokenizer
    longest = tokenizer.model_max_length
    cut = [(prompt, ids) for prompt in prompts if len(ids := tokenizer(prompt, verbose=False).input_ids) > longest]
    if cut:
        prompt, ids = cut[0]
        unread = tokenizer.decode(ids[longest - 1 :], skip_special_tokens=True)
        more = f"; {len(cut) - 1} more captions are too long" if len(cut) > 1 else ""
        message = f"truncated: the caption {shortened(prompt)!r} has {len(ids)} tokens, of which {longest} are read"
        logger.warning(printable(f"{message}; not read: {shortened(unread)!r}{more}."))


def shortened(text: str, longest: int = 100) -> str:
    """The start of a text."""
    return text if len(text) <= longest else text[: longest - 3] + "..."


def encode_tokens(pipeline: Any, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encode prompts as ``encoder_hidden_states`` (prompts, tokens, width).

    For XL these are the penultimate hidden states of both encoders, concatenated, and there are also ``text_embeds``
    (prompts, pooled), the projection of the second encoder.
    """
    if not is_xl(type(pipeline).__name__):
        return {"encoder_hidden_states": pipeline.text_encoder(tokens["text_encoder"])[0]}
    outputs = [getattr(pipeline, name)(ids, output_hidden_states=True) for name, ids in tokens.items()]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": hidden, "text_embeds": outputs[-1][0]}


def encode_prompts(pipeline: Any, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """Encode prompts in the text encoders' dtype; see ``encode_tokens``."""
    return encode_tokens(pipeline, tokenize(pipeline, prompts, device))


def guided(pipeline: Any, prompts: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoded prompts and the encoded empty prompt (zeros for XL's base model) as arguments of the pipeline."""
    if getattr(pipeline.config, "force_zeros_for_empty_prompt", False):
        negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
    arguments = {
        "prompt_embeds": prompts["encoder_hidden_states"],
        "negative_prompt_embeds": negative["encoder_hidden_states"],
    }
    if "text_embeds" in prompts:
        arguments |= {
            "pooled_prompt_embeds": prompts["text_embeds"],
            "negative_pooled_prompt_embeds": negative["text_embeds"],
        }
    return arguments
