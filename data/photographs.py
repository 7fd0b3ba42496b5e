"""A folder of photos: which images it contains, their captions, and the views of each to train on."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import (
    list_images,
    load_rgb,
    read_caption,
    readable_extensions,
    upright_size,
    warn_of_unread_images,
)
from delora_diffusers.json_lines import PHOTOS, read_json_lines
from delora_diffusers.names import METADATA_NAME

MAX_ASPECT_RATIO = 16
"""Scaling the short side of a narrower image to the resolution would make it enormous."""


@dataclasses.dataclass(frozen=True)
class Photo:
    """One image of a folder and its caption, if there is one."""

    path: Path
    caption: str | None = None

    def load(self) -> Image.Image:
        """The image, turned upright, as RGB."""
        return load_rgb(self.path)

    def size(self) -> tuple[int, int]:
        """(width, height) upright, without decoding."""
        return upright_size(self.path, str(self.path))


def find_photographs(folder: str | Path) -> list[Photo]:
    """The images of a folder, sorted by name. Each is decoded once to check that it is readable.

    Captions come from ``metadata.jsonl`` (``file_name`` and ``text``, the imagefolder convention) or from a ``.txt``
    file of the same name beside the image.

    Raises:
        InputError: the folder does not exist or has no images, an image cannot be read, or ``metadata.jsonl`` is
            invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that contains the photos.")
    paths = list_images(folder)
    warn_of_unread_images(folder)
    if not paths:
        raise InputError(f"{folder} contains no image ({', '.join(readable_extensions())}); put the photos there.")
    captions = _read_metadata(folder / METADATA_NAME)
    unknown = sorted(captions.keys() - {path.name for path in paths})
    if unknown:
        raise InputError(f"{folder / METADATA_NAME} lists {unknown[0]}, which is not in the folder; fix one of them.")
    photos = []
    for path in paths:
        width, height = load_rgb(path).size
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise InputError(f"{path} is {width} x {height} pixels, too long and narrow for a square crop; remove it.")
        caption = captions.get(path.name)
        photos.append(Photo(path, read_caption(path) if caption is None else caption))
    with_file: dict[str, Path] = {}
    for photo in photos:
        if photo.caption is not None and captions.get(photo.path.name) is None:
            other = with_file.setdefault(photo.path.stem, photo.path)
            if other != photo.path:
                raise InputError(f"{other} and {photo.path.name} share one caption file; rename one of them.")
    return photos


def _read_metadata(file: Path) -> dict[str, str | None]:
    if not file.is_file():
        return {}
    captions = {}
    for number, record in read_json_lines(file, PHOTOS):
        if record["file_name"] in captions:
            raise InputError(f"{file} line {number} lists {record['file_name']} again; give one caption for each.")
        if "text" not in record and "prompt" not in record:
            raise InputError(f"{file} line {number} is not a record like {PHOTOS.example} (it has no text); fix it.")
        captions[record["file_name"]] = record.get("text", record.get("prompt"))
    return captions


def crop_boxes(
    size: tuple[int, int], resolution: int, random_offsets: list[float] | None
) -> list[tuple[int, int, int, int]]:
    """Square crops of an image whose short side was scaled to ``resolution``.

    Args:
        size: (width, height) of the image before scaling.
        resolution: side length of the crops in pixels.
        random_offsets: position of each crop along the long side, 0 to 1; None for one centre crop.

    Returns:
        Distinct boxes (left, top, right, bottom) in the scaled image.
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
    """The views of a photo to train on, each (resolution, resolution, 3) uint8: its crops and their mirror images.

    Args:
        image: upright RGB image of any size.
        resolution: side length of the views in pixels.
        random_offsets: see ``crop_boxes``.
        flip: also return the mirror image of every view.
    """
    scaled = image.resize(scaled_size(image.size, resolution), Image.Resampling.LANCZOS)
    views = [np.asarray(scaled.crop(box)) for box in crop_boxes(image.size, resolution, random_offsets)]
    return views + ([view[:, ::-1] for view in views] if flip else [])


def view_sizes(
    size: tuple[int, int], resolution: int, random_offsets: list[float] | None, flip: bool
) -> list[tuple[int, int, int, int, int, int]]:
    """Stable Diffusion XL's size conditions for each of the ``variants``.

    Args:
        size: (width, height) of the upright image. The other arguments are those of ``variants``.

    Returns:
        For each view: height and width of the image, top and left of the crop in the scaled image (mirrored if the view
        is), height and width of the view.
    """
    width = scaled_size(size, resolution)[0]
    boxes = crop_boxes(size, resolution, random_offsets)
    corners = [(top, left) for left, top, _, _ in boxes]
    if flip:
        corners += [(top, width - right) for _, top, right, _ in boxes]
    return [(size[1], size[0], top, left, resolution, resolution) for top, left in corners]
