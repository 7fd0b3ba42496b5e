"""Pairs of an image and its semantic map: the supported layouts, the checks before training, and the cropped views."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.palettes import indices_of
from delora_diffusers.crops import Size, views_of
from delora_diffusers.errors import LOADING_ERRORS, InputError
from delora_diffusers.image_files import (
    list_images,
    load_rgb,
    read_caption,
    readable_extensions,
    upright_size,
    warn_of_unread_images,
)
from delora_diffusers.json_lines import IMAGES_WITH_MAPS, OFT_PROMPTS, read_json_lines
from delora_diffusers.maps import EXTENSIONS as MAP_EXTENSIONS
from delora_diffusers.maps import IGNORED, oft_prompts_file, read_map, refuse_repeated_keys
from delora_diffusers.names import METADATA_NAME

LISTED = 3
"""How many of the offending files an error message lists."""


@dataclasses.dataclass(frozen=True)
class MapPair:
    """An image, its semantic map and its caption.

    Attributes:
        name: unique; used in messages and as the name of generated files.
        map: the map, or its file.
        image: the image, or its file; None if there is only a map.
        caption: None if there is none.
    """

    name: str
    map: Path | Image.Image
    image: Path | Image.Image | None
    caption: str | None

    def load_image(self) -> Image.Image:
        """The image, upright, as RGB."""
        assert self.image is not None
        return self.image.convert("RGB") if isinstance(self.image, Image.Image) else load_rgb(self.image)

    def load_map(self, reduce_labels: bool = False) -> np.ndarray:
        """The map: (height, width) class indices or (height, width, 3) colours, uint8.

        Args:
            reduce_labels: map index 0 to "no class" (255) and index i to class i - 1, as for ADE20K's annotations.

        Raises:
            InputError: the map cannot be read, or contains indices above 255.
        """
        values = read_map(self.map, f"the map of {self.name}")
        if reduce_labels and values.ndim == 2:
            values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1).astype(np.uint8)
        return values


def find_pairs(folder: str | Path) -> list[MapPair]:
    """The pairs of a folder.

    Three layouts are supported: a ``metadata.jsonl`` with ``file_name``, ``map`` and ``text`` on each line; ``images/``
    and ``maps/`` with files of the same names (captions, if any, in ``metadata.jsonl`` or ``images/NAME.txt``); a split
    of ADE20K as prepared by OFT's release; see ``oft_prompts_file``.

    Returns:
        The pairs, in the order of ``metadata.jsonl`` or sorted by name.

    Raises:
        InputError: the folder has none of these layouts, a file has no counterpart, or a line cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder that contains images and maps.")
    prompts = oft_prompts_file(folder)
    if prompts is not None:
        return _oft_pairs(folder, prompts)
    file = folder / METADATA_NAME
    records = [record for _, record in read_json_lines(file, IMAGES_WITH_MAPS)] if file.is_file() else []
    if records and any("map" in record for record in records):
        return _listed_pairs(folder, records)
    if (folder / "images").is_dir() and (folder / "maps").is_dir():
        captions = {record["file_name"]: record.get("text") for record in records}
        return _named_pairs(folder / "images", folder / "maps", captions)
    raise InputError(
        f"{folder} contains no pairs; add a metadata.jsonl with file_name, map and text, or folders images and maps."
    )


def _listed_pairs(folder: Path, records: list[dict[str, Any]]) -> list[MapPair]:
    without_map = [record["file_name"] for record in records if "map" not in record]
    _refuse(without_map, f"lines of {folder / METADATA_NAME} have no map", "add a map to each")
    missing = [r[key] for r in records for key in ("file_name", "map") if not (folder / r[key]).is_file()]
    _refuse(missing, f"files listed in {folder / METADATA_NAME} are missing", "fix the list or the folder")
    refuse_repeated_keys((record["map"] for record in records), folder)
    lossy = [record["map"] for record in records if Path(record["map"]).suffix.lower() not in MAP_EXTENSIONS]
    _refuse(
        lossy, f"maps listed in {folder / METADATA_NAME} are in a format that may change classes", "save them as PNG"
    )
    _refuse_repeated([record["file_name"] for record in records], folder / METADATA_NAME)
    return [MapPair(r["file_name"], folder / r["map"], folder / r["file_name"], r.get("text")) for r in records]


def _named_pairs(images: Path, maps: Path, captions: dict[str, str | None]) -> list[MapPair]:
    readable = {images: None, maps: MAP_EXTENSIONS}
    for folder, extensions in readable.items():
        refuse_repeated_keys((path.name for path in list_images(folder, extensions)), folder)
        warn_of_unread_images(folder, extensions)
    image_files, map_files = ({p.stem: p for p in list_images(folder, e)} for folder, e in readable.items())
    _refuse(
        sorted(str(image_files[stem].name) for stem in image_files.keys() - map_files.keys()),
        f"images in {images} have no map of the same name in {maps}",
        "add the maps or remove the images",
    )
    _refuse(
        sorted(str(map_files[stem].name) for stem in map_files.keys() - image_files.keys()),
        f"maps in {maps} have no image of the same name in {images}",
        "add the images or remove the maps",
    )
    if not image_files:
        raise InputError(f"{images} contains no image ({', '.join(readable_extensions())}); put the images there.")
    listed = {name.removeprefix("images/") for name in captions}
    unknown = sorted(listed - {path.name for path in image_files.values()})
    _refuse(
        unknown, f"files listed in {images.parent / METADATA_NAME} are not in {images}", "fix the list or the folder"
    )
    pairs = []
    for stem, path in sorted(image_files.items()):
        caption = captions.get(path.name, captions.get(f"images/{path.name}"))
        pairs.append(MapPair(path.name, map_files[stem], path, read_caption(path) if caption is None else caption))
    return pairs


def _oft_pairs(folder: Path, prompts: Path) -> list[MapPair]:
    pairs = []
    for _, record in read_json_lines(prompts, OFT_PROMPTS):
        name = PurePosixPath(record["source"]).name
        pairs.append(MapPair(name, folder / "segm" / name, folder / "color" / name, record["prompt"]))
    _refuse_repeated([pair.name for pair in pairs], prompts)
    missing = [str(p.relative_to(folder)) for q in pairs for p in (q.map, q.image) if not Path(str(p)).is_file()]
    _refuse(missing, f"files listed in {prompts} are missing", "fix the list or the folder")
    return sorted(pairs, key=lambda pair: pair.name)


def find_hub_pairs(name: str, config: str | None, split: str, columns: tuple[str, str, str | None]) -> list[MapPair]:
    """The pairs of a dataset on the hub, or of a folder that ``datasets`` can load.

    Args:
        columns: names of the image column, the map column and the caption column; the last may be None.

    Raises:
        InputError: the dataset cannot be loaded, or does not have one of the columns.
    """
    import datasets

    try:
        dataset: Any = datasets.load_dataset(name, config, split=split)
    except (*LOADING_ERRORS, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"--dataset_name {name} could not be loaded ({' '.join(str(error).split())[:300]})."
        ) from error
    image, semantic, caption = columns
    for flag, column in (("image_column", image), ("map_column", semantic), ("caption_column", caption)):
        if column is not None and column not in dataset.column_names:
            raise InputError(f"--{flag} {column} is not a column of {name}; it has {', '.join(dataset.column_names)}.")
    digits = len(str(len(dataset)))
    return [
        MapPair(f"{i:0{digits}}", row[semantic], row[image], row[caption] if caption else None)
        for i, row in enumerate(dataset)
    ]


def _refuse_repeated(names: Sequence[str], file: Path) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    _refuse(repeated, f"files are listed more than once in {file}", "list each once")


def _refuse(names: Sequence[str], problem: str, remedy: str) -> None:
    """Raise InputError if there are any names: how many, the first few, what is wrong with them and the remedy."""
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        raise InputError(f"{len(names)} {problem}: {', '.join(names[:LISTED])}{more}; {remedy}.")


def check_pairs(
    pairs: Sequence[MapPair], palette: np.ndarray | None, reduce_labels: bool = False, need_captions: bool = True
) -> None:
    """Reject pairs that cannot be trained on. Decodes every map once.

    Args:
        palette: the colours of the classes, (classes, 3); if given, every index and colour of a map must be in it.
        reduce_labels: see ``MapPair.load_map``.

    Raises:
        InputError: a caption is missing, image and map differ in size, index maps and colour maps are mixed, or an
            index or colour is not in the palette. The message gives the count and the first few names.
    """
    if need_captions:
        without_caption = [pair.name for pair in pairs if pair.caption is None]
        _refuse(without_caption, "images have no caption", "add captions, or give --default_caption for all of them")

    def inspect(pair: MapPair) -> tuple[int, bool, int]:
        """(dimensions of the map, whether the sizes differ, highest class outside the palette or -1)"""
        values = pair.load_map(reduce_labels)
        if pair.image is not None and values.shape[1::-1] != upright_size(pair.image, pair.name):
            return values.ndim, True, -1
        if palette is None:
            return values.ndim, False, -1
        if values.ndim == 3:
            indices_of(values, palette, f"the map of {pair.name}")
            return values.ndim, False, -1
        classes = values[values != IGNORED]
        highest = int(classes.max(initial=0))
        return values.ndim, False, highest if highest >= len(palette) else -1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(inspect, pairs), total=len(pairs), desc="checking maps", disable=None, leave=False)
        results = list(progress)
    _refuse(
        [pair.name for pair, (_, differs, _) in zip(pairs, results) if differs],
        "maps differ in size from their images",
        "resize them with nearest-neighbour interpolation",
    )
    _refuse(
        [f"{pair.name} ({highest})" for pair, (_, _, highest) in zip(pairs, results) if highest >= 0],
        f"maps contain classes outside the palette of {0 if palette is None else len(palette)} colours",
        f"choose another --palette, or write {IGNORED} where there is no class",
    )
    kinds = [dimensions for dimensions, _, _ in results]
    different = [pair.name for pair, kind in zip(pairs, kinds) if kind != kinds[0]]
    _refuse(
        different,
        f"maps do not contain {'colours' if kinds[0] == 3 else 'indices'} as the others do",
        "convert them all to one kind",
    )


def pair_views(
    image: Image.Image, semantic: np.ndarray, size: Size, random_offsets: list[float] | None, flip: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The views of a pair to train on: image (height, width, 3) and map, cropped and flipped identically.

    Args:
        image: upright RGB image.
        semantic: its map, indices or colours, of the same size; scaled by nearest neighbour, never blended.
        size: of the views, width and height in pixels.
        random_offsets, flip: see ``views_of``.
    """
    views = views_of(image, size, random_offsets, flip, Image.fromarray(semantic))
    return [(view.image, view.companion) for view in views if view.companion is not None]
