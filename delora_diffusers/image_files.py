"""Image files: listing, decoding, EXIF orientation and captions. Imports no torch."""

import functools
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, features

from delora_diffusers.errors import InputError, printable
from delora_diffusers.names import CONTACT_SHEET_NAME
from delora_diffusers.text_files import read_text

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
"""Read if pillow-heif is installed."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF")
"""Pillow's names of the formats that are decoded, whatever a file's name says. Pillow knows more, some of which start
other programs."""
UNREAD_EXTENSIONS = (
    *(".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".xcf", ".tga", ".ico", ".icns", ".svg", ".eps", ".pdf", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pbm", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"),
)
"""Images that are not read; a warning names such files, since they look as if they were used."""
CAPTION_EXTENSIONS = (".txt", ".caption")
MASK_ENDINGS = (".mask", "_mask", "-mask", "-masklabel")
"""What the name of a photo's mask has after that of the photo, before the extension; the last is OneTrainer's."""

UNREADABLE = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        LookupError,
        EOFError,
        RuntimeError,
    ),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's decoders raise for files that are damaged or too large."""
ORIENTATION = 0x0112
"""The EXIF orientation tag."""
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How an image with this EXIF orientation is turned upright; 5 and above swap width and height."""


@functools.cache
def readable_extensions() -> tuple[str, ...]:
    """The extensions of the images that can be read with the installed packages."""
    extensions = EXTENSIONS if features.check("avif") else tuple(e for e in EXTENSIONS if e != ".avif")
    return extensions + (HEIF_EXTENSIONS if _register_heif() else ())


@functools.cache
def _formats() -> list[str]:
    """The formats that the installed packages can decode."""
    _register_heif()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def _register_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    register_heif_opener()
    return True


def list_images(folder: Path, extensions: tuple[str, ...] | None = None) -> list[Path]:
    """The image files in a folder, sorted by name. Hidden files, folders, devices and generate's contact sheet are no
    images.

    Args:
        extensions: in lower case; None for every format that can be read.

    Raises:
        InputError: the folder cannot be read.
    """
    extensions = readable_extensions() if extensions is None else extensions
    files = [path for path in _visible_files(folder) if path.name != CONTACT_SHEET_NAME]
    known = (*EXTENSIONS, *HEIF_EXTENSIONS, *UNREAD_EXTENSIONS)
    names = {name for path in files if path.suffix.lower() in known for name in (path.stem, path.name)}
    return [path for path in files if path.suffix.lower() in extensions and not _is_mask(path, names)]


def _is_mask(path: Path, names: set[str]) -> bool:
    """Whether an image is a mask: ``NAME.mask.png``, or another ending after the name of one of these images."""
    others = [path.stem.removesuffix(ending) for ending in MASK_ENDINGS if path.stem.endswith(ending)]
    return path.stem.endswith(MASK_ENDINGS[0]) or any(name in names for name in others)


def mask_beside(image: Path, alone: bool = False) -> Path | None:
    """The mask beside an image, ``NAME.mask.png``; None if there is none.

    Args:
        alone: it may also be ``NAME.png``, in a folder that has masks only.

    Raises:
        InputError: there are two.
    """
    endings = (*MASK_ENDINGS, "") if alone else MASK_ENDINGS
    names = {f"{name}{ending}" for ending in endings for name in (image.stem, image.name)}
    names |= {image.name} if alone else set()
    folder = image.parent
    files = [path for path in _visible_files(folder) if path.stem in names or path.name in names]
    files = [path for path in files if path.suffix.lower() in readable_extensions()]
    if len(files) > 1:
        raise InputError(f"{files[0]} and {files[1].name} are both masks of {image.name}; remove one of them.")
    return files[0] if files else None


def warn_of_unread_images(folder: Path, extensions: tuple[str, ...] | None = None) -> None:
    """Log the images in a folder that ``list_images`` leaves out, and how to use them."""
    read = readable_extensions() if extensions is None else extensions
    known = {*EXTENSIONS, *HEIF_EXTENSIONS, *UNREAD_EXTENSIONS}
    unread = [path.name for path in _visible_files(folder) if path.suffix.lower() in known - set(read)]
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        if extensions is None and (below := list_images(subfolder)):
            images = "1 image" if len(below) == 1 else f"{len(below)} images"
            logger.warning(printable(f"not used: {images} in the subfolder {subfolder}; move what you want to use up."))
    owners = {name for path in _visible_files(folder) for name in (path.stem, path.name)}
    masks = (path for path in _visible_files(folder) if path.stem.endswith(MASK_ENDINGS[0]))
    alone = [path.name for path in masks if path.stem.removesuffix(MASK_ENDINGS[0]) not in owners]
    if alone:
        logger.warning(printable(f"not used: {alone[0]} in {folder}, a mask without a photo; rename or remove it."))
    if unread:
        names = ", ".join(unread[:5]) + (f" and {len(unread) - 5} more" if len(unread) > 5 else "")
        heif = any(name.lower().endswith(HEIF_EXTENSIONS) for name in unread) and extensions is None
        remedy = "run `pip install pillow-heif` to read HEIC, or convert them" if heif else "convert them"
        logger.warning(
            printable(
                f"not used: {names} in {folder}, which cannot be read; {remedy} to {read[0][1:]}, or remove them."
            )
        )


def _visible_files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file())
    except OSError as error:
        raise InputError(f"{folder} could not be read ({error.strerror}); check its permissions.") from error


def open_image(path: Path) -> Image.Image:
    """Open an image without decoding it; its format must be one of ``FORMATS``.

    Raises:
        InputError: it is not an image file.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "is missing"
        raise InputError(f"{path} {problem}; replace or remove it.")
    try:
        return Image.open(path, formats=_formats())
    except UNREADABLE as error:
        raise unreadable(str(path), error) from error


def unreadable(name: str, error: Exception, kind: str = "image") -> InputError:
    """The error for an image that Pillow could not read."""
    if isinstance(error, Image.DecompressionBombError):
        return InputError(f"{name} has too many pixels ({error}); scale it down.")
    return InputError(f"{name} is not a readable {kind} ({error}); replace or remove it.")


def load_rgb(path: Path) -> Image.Image:
    """Decode an image of any mode, apply its EXIF orientation and convert it to RGB; transparency becomes white.

    Of an animation or a file with several images, the first is read. In 16-bit images 65535 is white.

    Raises:
        InputError: the file cannot be decoded, or has no defined white.
    """
    with _upright(path) as upright:
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright)
        return upright.convert("RGB")


@contextmanager
def _upright(path: Path) -> Iterator[Image.Image]:
    """A decoded image, turned by its EXIF orientation; 16 bits are made 8.

    Raises:
        InputError: see ``load_rgb``; also for what goes wrong while the image is used.
    """
    try:
        with open_image(path) as image:
            image.load()
            upright = image.transpose(TRANSPOSE[turn]) if (turn := _orientation(image)) in TRANSPOSE else image
            if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
                upright = _from_16_bits(upright, path, image.format)  # older versions of Pillow read 16-bit PNG as "I"
            yield upright
    except InputError:
        raise
    except UNREADABLE as error:
        raise unreadable(str(path), error) from error


def has_alpha(path: Path) -> bool:
    """Whether an image has transparent or translucent pixels."""
    with _upright(path) as image:
        return _is_translucent(image)


def _is_translucent(image: Image.Image) -> bool:
    return image.has_transparency_data and bool((np.asarray(image.convert("RGBA").getchannel("A")) < 255).any())


def load_mask(path: Path, size: tuple[int, int], alpha: bool = False) -> Image.Image:
    """A photo's mask, grey, from 0 for the background to 255.

    It is the alpha channel of an image that has transparent pixels, and otherwise the brightness. In a coloured palette
    index 0 is the background and every other is not. If the largest value is 1, then 1 stands for 255.

    Args:
        size: (width, height) of the photo; a mask of the same shape is scaled to it.
        alpha: always take the alpha channel.

    Raises:
        InputError: the file cannot be decoded, the shape is another, or every value is 0.
    """
    with _upright(path) as image:
        if alpha or _is_translucent(image):
            mask = image.convert("RGBA").getchannel("A")
        elif image.mode == "P" and not _is_grey(image):
            mask = Image.fromarray(np.where(np.asarray(image) == 0, 0, 255).astype(np.uint8))
        else:
            mask = image.convert("L")
    largest = int(np.asarray(mask).max(initial=0))
    if largest == 0:
        raise InputError(f"the mask {path} is black everywhere, so it marks nothing; paint the subject white.")
    if largest == 1:
        mask = mask.point(lambda value: value * 255)
    if mask.size != size:
        width, height = mask.size
        if abs(width * size[1] - height * size[0]) > max(width, height, *size):
            raise InputError(
                f"the mask {path} is {width} x {height} pixels, but its photo is {size[0]} x {size[1]}; give a mask of "
                "the same shape."
            )
        mask = mask.resize(size, Image.Resampling.BOX)
    return mask


def _is_grey(image: Image.Image) -> bool:
    """Whether all colours in use of an image with a palette are grey."""
    used = image.convert("RGB").getcolors(256) or []
    return all(isinstance(colour, tuple) and len(set(colour)) == 1 for _, colour in used)


def _from_16_bits(image: Image.Image, path: Path, image_format: str | None) -> Image.Image:
    """An 8-bit image; 65535 becomes 255."""
    values = np.asarray(image)
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image_format == "PNG")
    if not is_16_bit or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise InputError(f"{path} is a {kind} image, in which no value stands for white; convert it to 8 or 16 bits.")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or the metadata is damaged."""
    try:
        value = image.getexif().get(ORIENTATION)
    except UNREADABLE:
        return 1
    return value if isinstance(value, int) and value in TRANSPOSE else 1


def upright_size(source: Path | Image.Image, name: str) -> tuple[int, int]:
    """(width, height) of an image as ``load_rgb`` returns it, in most formats without decoding it.

    Args:
        source: a file, or an image that is already upright. name: how the error message refers to it.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(source, Image.Image):
        return source.size
    try:
        with open_image(source) as image:
            if image.format == "TIFF":
                image.load()  # turns it upright, and removes the orientation
            return image.size[::-1] if _orientation(image) >= 5 else image.size
    except InputError:
        raise
    except UNREADABLE as error:
        raise unreadable(name, error) from error


def read_caption(image: Path) -> str | None:
    """The text of the ``.txt`` or ``.caption`` file beside an image; None if there is none or it is empty.

    Raises:
        InputError: the file is not UTF-8, or there are two with different texts.
    """
    spellings = (ending for e in CAPTION_EXTENSIONS for ending in (e, e.upper(), e[:2].upper() + e[2:]))
    files = [file for ending in spellings if (file := image.with_suffix(ending)).is_file()]
    captions = {text: file for file in reversed(files) if (text := read_text(file).strip())}
    if len(captions) > 1:
        first, second, *_ = captions.values()
        raise InputError(f"{first} and {second} give {image.name} different captions; remove one of them.")
    return next(iter(captions), None)
