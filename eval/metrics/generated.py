"""Read output folders of generate: images with their prompts, or with the maps they were generated from."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from data.maps import MapPair, find_pairs
from delora_diffusers.errors import InputError, printable
from delora_diffusers.json_lines import GENERATED, GENERATED_FROM_MAPS, LineFormat, read_json_lines
from delora_diffusers.maps import map_key
from delora_diffusers.names import METADATA_NAME

logger = logging.getLogger(__name__)

Generated = list[tuple[Path, str]]
"""(image, prompt) of every generated image."""
Records = list[tuple[Path, dict[str, Any]]]
"""(image, what its line of ``metadata.jsonl`` says)."""


def read_generated(folder: Path) -> Generated:
    """The images that a folder's ``metadata.jsonl`` lists, with their prompts.

    Raises:
        InputError: there is no metadata, a line has no prompt, an image is missing.
    """
    records = _read(folder, GENERATED)
    _warn_of_strengths(folder, records)
    return [(path, record["prompt"]) for path, record in records]


def _warn_of_strengths(folder: Path, records: Records) -> None:
    strengths = sorted({float(record.get("strength", 1.0)) for _, record in records})
    if len(strengths) > 1:
        listed = ", ".join(f"{strength:g}" for strength in strengths)
        logger.warning(
            printable(f"{folder} has images at the strengths {listed}, which are averaged; generate them apart.")
        )


def check_base_images(folder: Path, flag: str) -> None:
    """Reject images of an adapter where those of the base model are expected.

    Raises:
        InputError: an image was generated with an adapter, at a strength other than 0.
    """
    for path, record in _read(folder, GENERATED):
        if record.get("adapter") and record.get("strength", 1.0) != 0:
            raise InputError(
                f"{flag}: {path} was generated with an adapter; give images of the base model, which the same command "
                "generates without --adapter."
            )


def by_prompt(generated: Generated) -> dict[str, list[Path]]:
    """The images of each prompt, in order."""
    images: dict[str, list[Path]] = {}
    for path, prompt in generated:
        images.setdefault(prompt, []).append(path)
    return images


def read_generated_from_maps(folder: Path, map_dir: Path) -> list[tuple[Path, MapPair]]:
    """The images that a folder's ``metadata.jsonl`` lists, each with the pair of ``map_dir`` whose map it follows.

    Maps of the same name that are other files may be the same scenes in other colours, so they are only warned of.

    Raises:
        InputError: there is no metadata, or the images were not generated from maps of this folder.
    """
    pairs = {map_key(Path(str(pair.map)).relative_to(map_dir).as_posix()): pair for pair in find_pairs(map_dir)}
    generated, others = [], []
    records = _read(folder, GENERATED_FROM_MAPS)
    _warn_of_strengths(folder, records)
    for path, record in records:
        key = map_key(record["map"])
        if key not in pairs:
            raise InputError(
                f"{path} was generated from map {key}, which is not in {map_dir}; give the folder of its maps."
            )
        used, given = record.get("map_sha256"), str(pairs[key].map)
        others += [given] if used and not hashlib.sha256(Path(given).read_bytes()).hexdigest().startswith(used) else []
        generated.append((path, pairs[key]))
    if others:
        logger.warning(
            printable(
                f"{others[0]} is not the file that its image was generated from, only of the same name "
                f"({len(others)} of {len(generated)} images); if it shows another scene, the scores mean nothing."
            )
        )
    return generated


def _read(folder: Path, line_format: LineFormat) -> Records:
    file = folder / METADATA_NAME
    if not file.is_file():
        raise InputError(f"{file} is missing; give a finished output folder of generate.")
    records = [(folder / record["file_name"], record) for _, record in read_json_lines(file, line_format)]
    missing = next((path for path, _ in records if not path.is_file()), None)
    if missing is not None:
        raise InputError(f"{missing} is missing, but {file.name} lists it; run generate again.")
    if not records:
        raise InputError(f"{file} is empty; generate images first.")
    return records
