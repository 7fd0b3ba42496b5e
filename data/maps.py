"""Pairs of a picture and its semantic map: where they are found, and what must be true of them."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.palettes import indices_of
from data.photographs import crop_boxes, scaled_size
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import EXTENSIONS, list_images, load_rgb, read_caption, upright_size
from delora_diffusers.json_lines import IMAGES_WITH_MAPS, OFT_PROMPTS, read_json_lines
from delora_diffusers.maps import IGNORED, read_map
from delora_diffusers.names import METADATA_NAME

NAMED = 3
"""How many of the files that are wrong a message names."""


@dataclasses.dataclass(frozen=True)
class MapPair:
    """A picture, the map of what it shows, and its caption.

    Attributes:
        name: for messages and for generated files; unique.
        map: the map's file, or the map itself.
        image: likewise; None if there is only a map.
        caption: None where there is none.
    """

    name: str
    map: Path | Image.Image
    image: Path | Image.Image | None
    caption: str | None

    def load_image(self) -> Image.Image:
        """The picture, upright, as RGB."""
        assert self.image is not None
        return self.image.convert("RGB") if isinstance(self.image, Image.Image) else load_rgb(self.image)

    def load_map(self, reduce_labels: bool = False) -> np.ndarray:
        """The map: (height, width) class indices or (height, width, 3) colours, uint8.

        Args:
            reduce_labels: index 0 is no class (255), and index i is class i - 1, as in ADE20K's annotations.

        Raises:
            InputError: it cannot be read, or holds indices above 255.
        """
        values = read_map(self.map, f"the map of {self.name}")
        if reduce_labels and values.ndim == 2:
            values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1).astype(np.uint8)
        return values


def find_pairs(folder: str | Path) -> list[MapPair]:
    """The pairs of a folder, in order of name.

    One of: ``metadata.jsonl`` with ``file_name``, ``map`` and ``text`` on each line; ``images/`` and ``maps/`` with
    files of the same names (captions in ``metadata.jsonl`` or ``images/NAME.txt``, or none); ADE20K as OFT's release
    prepares a split of it: ``color/``, ``segm/`` and ``prompt_*_blip.json``.

    Raises:
        InputError: none of these, files without a partner, a line that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name the folder that holds pictures and maps.")
    prompts = sorted(folder.glob("prompt_*_blip*.json"))
    if (folder / "segm").is_dir() and (folder / "color").is_dir() and prompts:
        return _oft_pairs(folder, prompts[0])
    file = folder / METADATA_NAME
    records = [record for _, record in read_json_lines(file, IMAGES_WITH_MAPS)] if file.is_file() else []
    if records and any("map" in record for record in records):
        return _listed_pairs(folder, records)
    if (folder / "images").is_dir() and (folder / "maps").is_dir():
        captions = {record["file_name"]: record.get("text") for record in records}
        return _named_pairs(folder / "images", folder / "maps", captions)
    raise InputError(
        f"{folder} holds no pairs; it needs a metadata.jsonl with file_name, map and text, or folders images and maps."
    )


def _listed_pairs(folder: Path, records: list[dict[str, Any]]) -> list[MapPair]:
    without = [record["file_name"] for record in records if "map" not in record]
    _refuse(without, f"lines of {folder / METADATA_NAME} name no map", "add a map to each")
    missing = [r[key] for r in records for key in ("file_name", "map") if not (folder / r[key]).is_file()]
    _refuse(missing, f"files that {folder / METADATA_NAME} names are missing", "mend the list or the folder")
    return [MapPair(r["file_name"], folder / r["map"], folder / r["file_name"], r.get("text")) for r in records]


def _named_pairs(images: Path, maps: Path, captions: dict[str, str | None]) -> list[MapPair]:
    pictures, drawn = ({path.stem: path for path in list_images(place)} for place in (images, maps))
    _refuse(
        sorted(str(pictures[stem].name) for stem in pictures.keys() - drawn.keys()),
        f"pictures of {images} have no map of that name in {maps}",
        "add the maps or remove the pictures",
    )
    _refuse(
        sorted(str(drawn[stem].name) for stem in drawn.keys() - pictures.keys()),
        f"maps of {maps} have no picture of that name in {images}",
        "add the pictures or remove the maps",
    )
    if not pictures:
        raise InputError(f"{images} holds no picture ({', '.join(EXTENSIONS)}); put the pictures there.")
    pairs = []
    for stem, path in sorted(pictures.items()):
        caption = captions.get(path.name, captions.get(f"images/{path.name}"))
        pairs.append(MapPair(path.name, drawn[stem], path, read_caption(path) if caption is None else caption))
    return pairs


def _oft_pairs(folder: Path, prompts: Path) -> list[MapPair]:
    pairs = []
    for _, record in read_json_lines(prompts, OFT_PROMPTS):
        name = Path(record["source"]).name
        pairs.append(MapPair(name, folder / "segm" / name, folder / "color" / name, record["prompt"]))
    missing = [str(p.relative_to(folder)) for q in pairs for p in (q.map, q.image) if not Path(str(p)).is_file()]
    _refuse(missing, f"files that {prompts} names are missing", "mend the list or the folder")
    return sorted(pairs, key=lambda pair: pair.name)


def find_hub_pairs(name: str, config: str | None, split: str, columns: tuple[str, str, str | None]) -> list[MapPair]:
    """The pairs of a dataset on the hub, or of a folder that ``datasets`` can load.

    Args:
        columns: of the picture, of the map, and of the caption or None.

    Raises:
        InputError: it cannot be loaded, or has no such column.
    """
    import datasets

    try:
        loaded: Any = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub and the readers of formats raise
        raise InputError(
            f"--dataset_name {name} could not be loaded ({' '.join(str(error).split())[:300]})."
        ) from error
    picture, semantic, caption = columns
    for flag, column in (("image_column", picture), ("map_column", semantic), ("caption_column", caption)):
        if column is not None and column not in loaded.column_names:
            raise InputError(f"--{flag} {column} is no column of {name}; it has {', '.join(loaded.column_names)}.")
    digits = len(str(len(loaded)))
    return [
        MapPair(f"{i:0{digits}}", row[semantic], row[picture], row[caption] if caption else None)
        for i, row in enumerate(loaded)
    ]


def _refuse(names: Sequence[str], what: str, remedy: str) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise InputError(f"{len(names)} {what}: {', '.join(names[:NAMED])}{more}; {remedy}.")


def check_pairs(
    pairs: Sequence[MapPair], palette: np.ndarray | None, reduce_labels: bool = False, need_captions: bool = True
) -> None:
    """Refuse pairs that cannot be trained on, every map decoded once.

    Args:
        palette: of the maps, (classes, 3); with one, a map's indices lie within it and its colours are in it.

    Raises:
        InputError: captions missing, picture and map of different size, maps of both kinds, an index or a colour
            outside the palette; the first few named, with counts.
    """
    if need_captions:
        bare = [pair.name for pair in pairs if pair.caption is None]
        _refuse(bare, "pictures have no caption", "add captions, or one for all with --default_caption")

    def look(pair: MapPair) -> tuple[int, bool, int]:
        """(dimensions of the map, whether the sizes differ, greatest class outside the palette or -1)"""
        values = pair.load_map(reduce_labels)
        if pair.image is not None and values.shape[1::-1] != upright_size(pair.image, pair.name):
            return values.ndim, True, -1
        if palette is None:
            return values.ndim, False, -1
        if values.ndim == 3:
            indices_of(values, palette, f"the map of {pair.name}")
            return values.ndim, False, -1
        classes = values[values != IGNORED]
        greatest = int(classes.max(initial=0))
        return values.ndim, False, greatest if greatest >= len(palette) else -1

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm(pool.map(look, pairs), total=len(pairs), desc="checking maps", disable=None, leave=False)
        seen = list(progress)
    _refuse(
        [pair.name for pair, (_, differs, _) in zip(pairs, seen) if differs],
        "maps are not of their picture's size",
        "scale them with nearest-neighbour, so that they fit",
    )
    _refuse(
        [f"{pair.name} ({greatest})" for pair, (_, _, greatest) in zip(pairs, seen) if greatest >= 0],
        f"maps hold classes outside the palette of {0 if palette is None else len(palette)} colours",
        f"name another --palette, or write {IGNORED} where there is no class",
    )
    kinds = [dimensions for dimensions, _, _ in seen]
    odd = [pair.name for pair, kind in zip(pairs, kinds) if kind != kinds[0]]
    _refuse(odd, f"maps are not {'in colour' if kinds[0] == 3 else 'indices'} as the others are", "make them all alike")


def pair_views(
    picture: Image.Image, semantic: np.ndarray, resolution: int, random_offsets: list[float] | None, flip: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The views of a pair to train on: picture (resolution, resolution, 3) and map, cropped and mirrored alike.

    Args:
        picture: upright RGB picture.
        semantic: its map of the same size, indices or colours; scaled by nearest neighbour, never blended.
        resolution: side of the views, pixels.
        random_offsets: see ``crop_boxes``.
        flip: whether mirror images are wanted too.
    """
    size = scaled_size(picture.size, resolution)
    scaled = picture.resize(size, Image.Resampling.LANCZOS)
    drawn = Image.fromarray(semantic).resize(size, Image.Resampling.NEAREST)
    views = []
    for box in crop_boxes(picture.size, resolution, random_offsets):
        views.append((np.asarray(scaled.crop(box)), np.asarray(drawn.crop(box))))
    return views + ([(a[:, ::-1], b[:, ::-1]) for a, b in views] if flip else [])
