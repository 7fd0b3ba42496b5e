"""Semantic maps: where a folder keeps them, how a file is decoded, painted in colour and cropped. Imports no torch."""

from pathlib import Path

import numpy as np
from PIL import Image

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import UNREADABLE, list_images, read_caption
from delora_diffusers.json_lines import IMAGES_WITH_MAPS, read_json_lines
from delora_diffusers.names import METADATA_NAME

IGNORED = 255
"""The index of pixels that belong to no class."""
EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".gif")
"""Formats that keep class indices intact."""
FOLDERS = ("maps", "segm")
"""Where a folder of images may keep its maps; ``segm`` is OFT's."""


def read_map(source: Path | Image.Image, name: str) -> np.ndarray:
    """A map as class indices (height, width) or as colours (height, width, 3), uint8.

    Args:
        source: a file, or a decoded image. name: for the message.

    Raises:
        InputError: it cannot be read, or has indices above 255.
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
    """(map file, caption) in order of name.

    The folder is laid out as for training (``metadata.jsonl`` with ``map`` and ``text``, or ``maps/`` beside
    ``images/``), or contains the maps themselves; captions are in its ``metadata.jsonl`` or in ``NAME.txt`` files.

    Raises:
        InputError: no such folder, no map in it, a map without a caption.
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
                raise InputError(f"{file} names no map for {without}; add one to every line.")
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
            f"{len(bare)} maps have no caption, the first is {bare[0]}; add captions, or give --default_caption."
        )
    return captioned


def paint(values: np.ndarray, palette: np.ndarray | None, name: str = "the map") -> np.ndarray:
    """A map in colour, (height, width, 3) uint8. Index 255 is black unless the palette has such an entry.

    Args:
        values: class indices (height, width), or colours, which are returned as they are.
        palette: (classes, 3) uint8, or None if only maps in colour are accepted. name: for the message.

    Raises:
        InputError: an index map without a palette, or an index outside it.
    """
    if values.ndim == 3:
        return values
    if palette is None:
        raise InputError(f"{name} has class indices, but this adapter was trained on maps in colour; give such maps.")
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    outside = sorted(set(np.unique(values).tolist()) - set(range(len(palette))) - {IGNORED})
    if outside:
        raise InputError(f"{name} has class {outside[0]}, but the palette has {len(palette)} colours; fix the map.")
    return colours[values]


def crop_square(values: np.ndarray, side: int) -> np.ndarray:
    """The centre square of a map whose short side is scaled to ``side`` pixels by nearest neighbour, as in training."""
    height, width = values.shape[:2]
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    scaled = np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))
    top, left = round((size[1] - side) / 2), round((size[0] - side) / 2)
    return scaled[top : top + side, left : left + side]
