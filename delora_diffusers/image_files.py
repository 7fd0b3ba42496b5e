"""Image files: listing, decoding, EXIF orientation and captions. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from delora_diffusers.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is not an image or is truncated."""
ORIENTATION = 0x0112
"""The EXIF orientation tag; values of 5 and above swap width and height."""


def list_images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The image files in a folder, sorted by name, without hidden files."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in extensions and not p.name.startswith("."))


def load_rgb(path: Path) -> Image.Image:
    """Decode an image of any mode, apply its EXIF orientation and convert it to RGB; transparency becomes white.

    Raises:
        InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UNREADABLE as error:
        raise InputError(f"{path} is not a readable image ({error}); replace or remove it.") from error
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        values = np.asarray(upright, dtype=np.float64)
        upright = Image.fromarray((values * (255 / max(values.max(), 1))).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


def upright_size(source: Path | Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an image with its EXIF orientation applied, without decoding it.

    Args:
        source: a file, or an image that is already upright. name: how the error message refers to it.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(source) as image:
            swapped = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if swapped else image.size
    except UNREADABLE as error:
        raise InputError(f"{name} is not a readable image ({error}); replace or remove it.") from error


def read_caption(image: Path) -> str | None:
    """The text of the ``.txt`` file beside an image; None if it is missing or empty."""
    file = image.with_suffix(".txt")
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None
