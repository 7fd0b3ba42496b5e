"""CLIP's tokenizer from the vocabulary that open_clip contains, for checkpoints, which come without one."""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError

MERGES = 49152 - 256 - 2
"""The number of merges that CLIP uses of the file, whose first line is a comment (OpenAI's simple_tokenizer.py)."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(pad_token: str = END) -> Any:
    """A ``CLIPTokenizer`` for 77 tokens.

    Args:
        pad_token: Stable Diffusion 2.x and XL's second tokenizer pad with ``!``, whose id is 0.

    Raises:
        InputError: open_clip is not installed.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    package = importlib.util.find_spec("open_clip")  # importing it takes seconds
    if package is None or package.origin is None:
        raise InputError("a base model in one file needs open_clip; run `pip install open_clip_torch`.")
    text = gzip.decompress((Path(package.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges: Any = [tuple(line.split()) for line in text.split("\n")[1 : MERGES + 1]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), BEGIN, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer: Any = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)
    # Given to the constructor, it would become a special token, and a prompt's exclamation marks would be padding.
    tokenizer.pad_token = pad_token
    return tokenizer
