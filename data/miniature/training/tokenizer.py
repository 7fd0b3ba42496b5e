"""A CLIP tokenizer that encodes every word in toybox's captions as one token, and accepts any other text."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

from data.tiny_sd import SPECIAL_TOKENS, byte_alphabet
from data.toybox.captions import IDENTIFIERS, OPENINGS, PATTERN_PHRASES, VIEWS
from data.toybox.places import PLACES
from data.toybox.shapes import CLASSES
from data.toybox.surfaces import COLOURS

EXTRA_WORDS = (
    "photo",
    "image",
    "painting",
    "drawing",
    "blurry",
    "bright",
    "dark",
    "small",
    "large",
    "my",
    "two",
    "this",
)


def words() -> list[str]:
    """Every word in toybox's captions, and some that people are likely to type."""
    texts: list[str] = [*CLASSES, *COLOURS, *EXTRA_WORDS, *OPENINGS]
    texts += [phrase for phrases in PATTERN_PHRASES.values() for phrase in phrases]
    texts += [phrase for phrases in VIEWS.values() for phrase in phrases]
    texts += [phrase for place in PLACES.values() for phrase in place.phrases]
    distinct = {w for text in texts for w in text.replace("-", " ").replace(",", " ").split() if w.isalpha()}
    return [*sorted(distinct), *IDENTIFIERS]


def merges(vocabulary: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn each word into one token, merging letters from the left."""
    pairs: dict[tuple[str, str], None] = {}
    for word in vocabulary:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # applies the earliest known merge first, as the tokenizer does
            known = [pair for pair in itertools.pairwise(pieces) if pair in pairs]
            order = list(pairs)
            pair = min(known, key=order.index) if known else (pieces[0], pieces[1])
            pairs.setdefault(pair)
            index = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == pair)
            pieces[index : index + 2] = [pair[0] + pair[1]]
    return list(pairs)


def write_tokenizer(folder: Path):
    """Write the tokenizer's files and load it."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges(words())
    alphabet = byte_alphabet()
    tokens = alphabet + [character + "</w>" for character in alphabet]
    tokens += [a + b for a, b in pairs] + list(SPECIAL_TOKENS)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "unk_token": SPECIAL_TOKENS[1],
        "pad_token": "!",  # as in Stable Diffusion 2: the end of the text is then where the token id is highest
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
