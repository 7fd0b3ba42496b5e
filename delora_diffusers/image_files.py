"""Image files: which are listed, how they are decoded, which way is up, the caption beside them. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from delora_diffusers.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is not an image, or not a complete one."""
ORIENTATION = 0x0112
"""The EXIF tag; from 5 on, width and height are swapped."""


def list_images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """The image files of a folder in order of name, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in extensions and not p.name.startswith("."))


def load_rgb(path: Path) -> Image.Image:
    """Decode an image of any mode, turn it upright by its EXIF tag and convert it to RGB; transparency becomes white.

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
    """(width, height) of an image after it is turned upright, without decoding it.

    Args:
        source: a file, or an image that is upright already. name: for the message.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(source, Image.Image):
        return source.size
    try:
        with Image.open(source) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except UNREADABLE as error:
        raise InputError(f"{name} is not a readable image ({error}); replace or remove it.") from error


def read_caption(image: Path) -> str | None:
    """The text of the ``.txt`` file beside an image; None if there is none or it is empty."""
    file = image.with_suffix(".txt")
    return file.read_text(encoding="utf-8").strip() or None if file.is_file() else None
