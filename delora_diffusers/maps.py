"""Semantic maps: finding, decoding, colouring and cropping them. Imports no torch."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from delora_diffusers.crops import Size, crop_boxes, scaled_size
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import (
    UNREADABLE,
    list_images,
    open_image,
    read_caption,
    unreadable,
    warn_of_unread_images,
)
from delora_diffusers.json_lines import IMAGES_WITH_MAPS, OFT_PROMPTS, read_json_lines
from delora_diffusers.names import METADATA_NAME
from delora_diffusers.wording import and_more

IGNORED = 255
"""The class index of unlabelled pixels."""
EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Formats that store class indices without loss."""
FOLDERS = ("maps", "segm")
"""Subfolders that may contain the maps; ``segm`` is OFT's name."""


def read_map(source: Path | Image.Image, name: str) -> np.ndarray:
    """A map as class indices (height, width) or colours (height, width, 3), uint8.

    Args:
        source: a file, or a decoded image. name: how the error message refers to it.

    Raises:
        InputError: the map cannot be read or has indices above 255.
    """
    try:
        image = source if isinstance(source, Image.Image) else open_image(source)
        stored_as = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
        image.load()
        if image.mode == "F" or "RGB;16" in stored_as or "RGBA;16" in stored_as:
            raise InputError(f"{name} has floating-point or 16-bit colours, which are no classes; save it as 8 bits.")
        if image.mode in ("LA", "La"):
            image = image.getchannel("L")
        as_they_are = image.mode in ("P", "L", "1") or image.mode.startswith("I")
        values = np.asarray(image if as_they_are else image.convert("RGB"))
        # Pillow spreads 2 and 4 bits over 0 to 255.
        values = values // {"L;2": 85, "L;4": 17}.get(stored_as.strip("()',"), 1)
    except InputError:
        raise
    except UNREADABLE as error:
        raise unreadable(name, error, "map") from error
    for value in (values.min(initial=0), values.max(initial=0)):
        if not 0 <= value <= 255:
            raise InputError(f"{name} has class {value}; a map has at most 256 classes, 0 to 255.")
    return values.astype(np.uint8)


def map_key(path: str) -> str:
    """What identifies a map in its folder: its path without the folder of the maps and without the extension.

    An image generated from the map has this name, and a map has the caption of the image with the same key.
    """
    parts = PurePosixPath(path).with_suffix("").parts
    return "/".join(parts[1:] if len(parts) > 1 and parts[0] in (*FOLDERS, "images", "color") else parts)


def refuse_repeated_keys(paths: Iterable[str], folder: Path) -> None:
    """Refuse files that differ only in their extension.

    Raises:
        InputError
    """
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(map_key(path), path)
        if other != path:
            raise InputError(f"{folder} contains both {other} and {path}; rename or remove one of them.")


@dataclasses.dataclass(frozen=True)
class CaptionedMap:
    """A map to generate images from.

    Attributes:
        key: see ``map_key``.
    """

    key: str
    path: Path
    caption: str


def oft_prompts_file(folder: Path) -> Path | None:
    """The list of a split of ADE20K as prepared by OFT's release; None if the folder is not such a split.

    The split has ``color/``, ``segm/`` and ``prompt_*_blip.json``. A ``prompt_*_blip_full.json`` is the complete list;
    the other list of the validation split is an excerpt for OFT's logs.
    """
    if not ((folder / "segm").is_dir() and (folder / "color").is_dir()):
        return None
    files = sorted(folder.glob("prompt_*_blip_full.json")) or sorted(folder.glob("prompt_*_blip*.json"))
    return files[0] if files else None


def find_maps(folder: Path, default_caption: str | None) -> list[CaptionedMap]:
    """The maps of a folder, sorted by name or in the order of a ``metadata.jsonl`` that lists them.

    The folder has the layout of training data (``metadata.jsonl`` with ``map`` and ``text``, ``maps/`` next to
    ``images/``, or a split of ADE20K as prepared by OFT's release) or contains the maps directly. Captions are in its
    ``metadata.jsonl`` or in ``NAME.txt`` files.

    Raises:
        InputError: the folder does not exist or contains no map, a map has no caption, or two maps have one name.
    """
    if not folder.is_dir():
        raise InputError(f"--map_dir {folder} is not a folder; give the folder that contains the maps.")
    file, captions = folder / METADATA_NAME, {}
    map_folder = next((folder / name for name in FOLDERS if (folder / name).is_dir()), folder)
    names = [path.relative_to(folder).as_posix() for path in list_images(map_folder, EXTENSIONS)]
    prompts = oft_prompts_file(folder)
    if prompts is not None:
        captions = {
            map_key(f"segm/{PurePosixPath(record['source']).name}"): record["prompt"]
            for _, record in read_json_lines(prompts, OFT_PROMPTS)
        }
        names = [name for name in names if map_key(name) in captions]
    elif file.is_file():
        records = [record for _, record in read_json_lines(file, IMAGES_WITH_MAPS)]
        captions = {map_key(record["file_name"]): record.get("text") for record in records}
        if any("map" in record for record in records):
            without = next((record["file_name"] for record in records if "map" not in record), None)
            if without is not None:
                raise InputError(f"{file} has no map for {without}; add a map to every line.")
            names = list(dict.fromkeys(record["map"] for record in records))
            captions = {map_key(record["map"]): record.get("text") for record in records}
            if len(names) < len(records):
                raise InputError(f"{file} lists a map more than once; list each once.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        problem = f"{missing[0]} is missing{and_more(missing)}" if missing else "it contains no map"
        raise InputError(f"--map_dir {folder}: {problem}; put the maps there as PNG files.")
    warn_of_unread_images(map_folder, EXTENSIONS)
    refuse_repeated_keys(names, folder)
    maps, bare = [], []
    for name in names:
        key, path = map_key(name), folder / name
        candidates = (captions.get(key), read_caption(path), read_caption(folder / "images" / f"{key}.png"))
        caption = next((text for text in candidates if text is not None), default_caption)
        bare += [name] if caption is None else []
        maps.append(CaptionedMap(key, path, caption or ""))
    if bare:
        raise InputError(f"the map {bare[0]} has no caption{and_more(bare)}; add captions, or pass --default_caption.")
    return maps


def paint(values: np.ndarray, palette: np.ndarray | None, name: str = "the map") -> np.ndarray:
    """A map in colour, (height, width, 3) uint8. Index 255 is black unless the palette has 256 entries.

    Args:
        values: class indices (height, width), or colours, which are returned unchanged.
        palette: (classes, 3) uint8, or None to accept only maps in colour. name: how the error message refers to it.

    Raises:
        InputError: an index map is given without a palette, or has an index outside the palette.
    """
    if values.ndim == 3:
        return values
    if palette is None:
        raise InputError(f"{name} has class indices, but this adapter was trained on maps in colour; use those.")
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    outside = sorted(set(np.unique(values).tolist()) - set(range(len(palette))) - {IGNORED})
    if outside:
        raise InputError(f"{name} has class {outside[0]}, but the palette has {len(palette)} colours; fix the map.")
    return colours[values]


def crop_map(values: np.ndarray, size: Size) -> np.ndarray:
    """Scale a map to cover a size (nearest neighbour) and crop its centre, as in training."""
    whole = Image.fromarray(values)
    (box,) = crop_boxes(whole.size, size, None)
    return np.asarray(whole.resize(scaled_size(whole.size, size), Image.Resampling.NEAREST).crop(box))
