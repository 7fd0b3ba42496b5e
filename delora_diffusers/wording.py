"""Numbers in messages and captions, in natural English. Imports nothing."""

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """``1 subject``, ``2 subjects``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def and_more(names: Sequence[str]) -> str:
    """``, and 2 more``, after the first of some names; empty for one."""
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
