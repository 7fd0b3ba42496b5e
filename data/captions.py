"""Prompts and captions: the subject's name in templates, and the orders of a caption's tags."""

from collections.abc import Sequence

import numpy as np

from delora_diffusers.errors import InputError
from delora_diffusers.names import INSTANCE

ORDERS = 16
"""How many random orders of a caption's tags are trained on; each is encoded once."""


def with_instance(text: str, name: str | None, source: str) -> str:
    """A prompt with the subject's name in place of ``{instance}``.

    Args:
        source: what contains the prompt, for the message.

    Raises:
        InputError: the prompt has ``{instance}``, and there is no name.
    """
    if INSTANCE not in text:
        return text
    if not (name or "").strip():
        raise InputError(
            f"{source} contains {INSTANCE}, but no name was given; give --instance_name, for example 'sks dog'."
        )
    return text.replace(INSTANCE, name or "")


def tag_orders(caption: str, seed: Sequence[int], keep: int = 0) -> tuple[str, ...]:
    """Random orders of a caption's tags, which commas separate, at most ``ORDERS`` and without repetition.

    Args:
        seed: numbers from which the orders follow.
        keep: so many leading tags stay where they are.
    """
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    if len(tags) - keep < 2:
        return (caption,)
    random = np.random.default_rng(seed)
    head, tail = tags[:keep], tags[keep:]
    orders = ([*head, *(tail[i] for i in random.permutation(len(tail)))] for _ in range(ORDERS))
    return tuple(dict.fromkeys(", ".join(order) for order in orders))
