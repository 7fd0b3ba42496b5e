"""Semantic maps: finding, decoding, colouring and cropping them. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import UNREADABLE, list_images, read_caption
from delora_diffusers.json_lines import IMAGES_WITH_MAPS, read_json_lines
from delora_diffusers.names import METADATA_NAME

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
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        if image.mode == "1":
            image = image.convert("L")
        values = np.asarray(image if image.mode in ("P", "L") or image.mode.startswith("I") else image.convert("RGB"))
    except UNREADABLE as error:
        raise InputError(f"{name} is not a readable map ({error}); replace or remove it.") from error
    if values.max(initial=0) > 255:
        raise InputError(f"{name} has class {values.max()}; a map has at most 256 classes, 0 to 255.")
    return values.astype(np.uint8)


def find_maps(folder: Path, default_caption: str | None) -> list[tuple[Path, str]]:
    """(map file, caption) pairs, sorted by name or in the order of a ``metadata.jsonl`` that lists the maps.

    The folder has the layout of training data (``metadata.jsonl`` with ``map`` and ``text``, or ``maps/`` next to
    ``images/``) or contains the maps directly. Captions are in its ``metadata.jsonl`` or in ``NAME.txt`` files.

    Raises:
        InputError: the folder does not exist or contains no map, or a map has no caption.
    """
    if not folder.is_dir():
        raise InputError(f"--map_dir {folder} is not a folder; give the folder that contains the maps.")
    file, captions = folder / METADATA_NAME, {}
    map_folder = next((folder / name for name in FOLDERS if (folder / name).is_dir()), folder)
    paths = list_images(map_folder, EXTENSIONS)
    if file.is_file():
        records = [record for _, record in read_json_lines(file, IMAGES_WITH_MAPS)]
        captions = {Path(record["file_name"]).stem: record.get("text") for record in records}
        if any("map" in record for record in records):
            without = next((record["file_name"] for record in records if "map" not in record), None)
            if without is not None:
                raise InputError(f"{file} has no map for {without}; add a map to every line.")
            paths = [folder / record["map"] for record in records]
            captions = {Path(record["map"]).stem: record.get("text") for record in records}
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        problem = f"{len(missing)} maps are missing, the first is {missing[0]}" if missing else "it contains no map"
        raise InputError(f"--map_dir {folder}: {problem}; put the maps there as PNG files.")
    captioned, bare = [], []
    for path in paths:
        candidates = (captions.get(path.stem), read_caption(path), read_caption(folder / "images" / path.name))
        caption = next((text for text in candidates if text is not None), default_caption)
        bare += [path.name] if caption is None else []
        captioned.append((path, caption or ""))
    if bare:
        raise InputError(
            f"{len(bare)} maps have no caption, the first is {bare[0]}; add captions, or pass --default_caption."
        )
    return captioned


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


def crop_square(values: np.ndarray, side: int) -> np.ndarray:
    """Scale a map's short side to ``side`` pixels (nearest neighbour) and crop the centre square, as in training."""
    height, width = values.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    scaled = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    top, left = round((size[1] - side) / 2), round((size[0] - side) / 2)
    return scaled[top : top + side, left : left + side]
