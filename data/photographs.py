"""A folder of photographs: what is in it, its captions, and each picture upright in RGB."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclasses.dataclass(frozen=True)
class Photograph:
    """One picture of a folder and the caption found for it, if any."""

    path: Path
    caption: str | None = None

    def load(self) -> Image.Image:
        """The picture, turned upright, as RGB."""
        return load_rgb(self.path)

    def size(self) -> tuple[int, int]:
        """(width, height) upright, without decoding."""
        with Image.open(self.path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else image.size


def load_rgb(path: Path) -> Image.Image:
    """Read a picture of any mode, turn it upright by its EXIF tag and make it RGB (transparency becomes white).

    Raises:
        InputError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a readable picture ({error}); replace or remove it.") from error
    if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
        values = np.asarray(upright, dtype=np.float64)
        upright = Image.fromarray((values * (255 / max(values.max(), 1))).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright)
    return upright.convert("RGB")


def find_photographs(folder: str | Path) -> list[Photograph]:
    """The pictures of a folder in order of name, every one of them decoded once to be sure that it can be.

    Captions come from ``metadata.jsonl`` (``file_name`` and ``text``, the imagefolder convention) or from a ``.txt``
    file of the picture's name beside it.

    Raises:
        InputError: no such folder, no picture in it, a picture that cannot be read, a broken ``metadata.jsonl``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder that holds the photographs.")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    if not paths:
        raise InputError(f"{folder} holds no picture ({', '.join(EXTENSIONS)}); put the photographs there.")
    captions = _read_metadata(folder)
    unknown = sorted(set(captions) - {path.name for path in paths})
    if unknown:
        raise InputError(
            f"{folder / 'metadata.jsonl'} names {unknown[0]}, which is not in the folder; mend one of them."
        )
    found = []
    for path in paths:
        load_rgb(path)
        beside = path.with_suffix(".txt")
        caption = captions.get(path.name)
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip() or None
        found.append(Photograph(path, caption))
    return found


def _read_metadata(folder: Path) -> dict[str, str]:
    file = folder / "metadata.jsonl"
    if not file.is_file():
        return {}
    captions = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                record = json.loads(line)
                captions[record["file_name"]] = record["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{file} line {number} is not a record like {{"file_name": "01.jpg", "text": "..."}}; mend it.'
                ) from error
    return captions


def crop_boxes(
    size: tuple[int, int], resolution: int, random_offsets: list[float] | None
) -> list[tuple[int, int, int, int]]:
    """Square crops of a picture whose short side was scaled to ``resolution``.

    Args:
        size: (width, height) of the picture before scaling.
        resolution: side of the crops, pixels.
        random_offsets: where along the long side each crop lies, 0 to 1; None for the centre.

    Returns:
        Distinct boxes (left, top, right, bottom) in the scaled picture.
    """
    width, height = scaled_size(size, resolution)
    boxes = []
    for offset in [0.5] if random_offsets is None else random_offsets:
        left, top = round((width - resolution) * offset), round((height - resolution) * offset)
        boxes.append((left, top, left + resolution, top + resolution))
    return list(dict.fromkeys(boxes))


def scaled_size(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """(width, height) with the short side scaled to ``resolution``."""
    scale = resolution / min(size)
    return max(resolution, round(size[0] * scale)), max(resolution, round(size[1] * scale))


def variants(image: Image.Image, resolution: int, random_offsets: list[float] | None, flip: bool) -> list[np.ndarray]:
    """The views of a photograph to train on, each (resolution, resolution, 3) uint8: its crops and their mirror images.

    Args:
        image: upright RGB picture of any size.
        resolution: side of the views, pixels.
        random_offsets: see ``crop_boxes``.
        flip: whether mirror images are wanted too.
    """
    scaled = image.resize(scaled_size(image.size, resolution), Image.Resampling.LANCZOS)
    views = [np.asarray(scaled.crop(box)) for box in crop_boxes(image.size, resolution, random_offsets)]
    return views + ([view[:, ::-1] for view in views] if flip else [])


def view_sizes(
    size: tuple[int, int], resolution: int, random_offsets: list[float] | None, flip: bool
) -> list[tuple[int, int, int, int, int, int]]:
    """What Stable Diffusion XL is told of each of the ``variants``.

    Height and width of the picture, top and left of the crop in the scaled one (mirrored like it), height and width of
    the view.

    Args:
        size: (width, height) of the upright picture. The others are those of ``variants``.
    """
    width = scaled_size(size, resolution)[0]
    boxes = crop_boxes(size, resolution, random_offsets)
    corners = [(top, left) for left, top, _, _ in boxes]
    if flip:
        corners += [(top, width - right) for _, top, right, _ in boxes]
    return [(size[1], size[0], top, left, resolution, resolution) for top, left in corners]
