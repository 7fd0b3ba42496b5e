"""Which files belong to a photo in its folder, by the project's conventions, and how large a photo may be. No torch."""

from pathlib import Path
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import CAPTION_EXTENSIONS, MASK_ENDINGS, open_image, readable_extensions
from delora_diffusers.text_files import is_text

MAX_PIXELS = 80_000_000
"""Of a photo, which takes 240 MB decoded; phones have up to 50 million, unless they are asked for more."""
LONGEST_CAPTION = 5000
"""Characters; text encoders read a few hundred at most."""


def belongs(name: str, photo: Path) -> bool:
    """Whether a file of this name can be the caption or a mask of a photo in its folder."""
    stem, suffix = Path(name).stem, Path(name).suffix.lower()
    if suffix in CAPTION_EXTENSIONS:
        return stem == photo.stem
    owners = [stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)]
    return suffix in readable_extensions() and any(owner in (photo.stem, photo.name) for owner in owners)


def caption_files(photo: Path) -> list[Path]:
    files = sorted(path for path in photo.parent.iterdir() if path.suffix.lower() in CAPTION_EXTENSIONS)
    return [path for path in files if path.stem == photo.stem]


def owner_of(name: str) -> str:
    """The name without its extension and the ending of a mask."""
    stem = Path(name).stem
    return next((stem.removesuffix(ending) for ending in MASK_ENDINGS if stem.endswith(ending)), stem)


def check_pixels(path: Path, name: str) -> None:
    """Refuse a photo that is too large, from its header."""
    with open_image(path) as image:
        width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million that are read; scale "
            "it down."
        )


def text_of(record: dict[str, Any]) -> str | None:
    """The caption in a line of ``metadata.jsonl``."""
    return record.get("text", record.get("prompt"))


def checked_caption(text: str, file: str) -> str:
    """A caption without surrounding spaces.

    Raises:
        InputError: it cannot be written as UTF-8, or is longer than any caption.
    """
    if not is_text(text):
        raise InputError(f"the caption of {file} contains characters that are no text; type it again.")
    if len(text) > LONGEST_CAPTION:
        raise InputError(f"the caption of {file} has {len(text):,} characters; give at most {LONGEST_CAPTION:,}.")
    return text.strip()
