"""Records of generated images: one per image, stored in the image itself and in ``metadata.jsonl``."""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.files.reading import adapter_path
from delora_diffusers.image_files import UNREADABLE, list_images, open_image
from delora_diffusers.json_lines import GENERATED, REQUESTS, read_json_lines, write_json_lines
from delora_diffusers.maps import find_maps
from delora_diffusers.names import CONTACT_SHEET_NAME, METADATA_NAME
from delora_diffusers.text_files import parse_json

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
RECORD_KEY = "delora_diffusers"
"""The PNG text entry that records how an image was generated."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Images to generate for prompts or maps with one set of adapters.

    Attributes:
        adapters: (path, weight) pairs; empty for the base model. strengths: each one scales all adapters.
        seed: image k of every prompt has seed + k.
    """

    adapters: tuple[tuple[Path, float], ...]
    prompts: tuple[str, ...]
    output_dir: Path
    seed: int
    strengths: tuple[float, ...] = (1.0,)


def read_requests(file: Path, seed: int, strengths: tuple[float, ...]) -> list[Request]:
    """Requests from lines like ``{"adapter": "runs/dog", "prompts": ["a sks dog"], "output_dir": "out", "seed": 0}``.

    Args:
        seed, strengths: of lines without a seed or a strength.

    Raises:
        InputError: the file does not exist, a line is not such a record, or two lines have the same output folder.
    """
    if not file.is_file():
        raise InputError(f"--requests_file {file} is not a file; write one line per adapter to it.")
    requests: list[Request] = []
    for number, record in read_json_lines(file, REQUESTS):
        record = {"seed": seed, "adapter": None} | record
        prompts, adapter = record["prompts"], record["adapter"]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"{file} line {number} has prompts that are not a list of at least one string; fix it.")
        if not math.isfinite(record.get("strength", 1.0)):
            raise InputError(f"{file} line {number} has the strength {record['strength']}; give a finite number.")
        at = (float(record["strength"]),) if "strength" in record else strengths
        adapters = () if adapter is None else ((Path(adapter), 1.0),)
        requests.append(Request(adapters, tuple(prompts), Path(record["output_dir"]), record["seed"], at))
    if not requests:
        raise InputError(f"--requests_file {file} is empty; write one line per adapter.")
    folders = [request.output_dir.resolve() for request in requests]
    repeated = next((r.output_dir for r, folder in zip(requests, folders) if folders.count(folder) > 1), None)
    if repeated is not None:
        raise InputError(f"{file} has the output_dir {repeated} in two requests; give each a different one.")
    return requests


def plan(
    request: Request, options: argparse.Namespace, base_model: str | None, prediction: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The record of every image, in order, as ``metadata.jsonl`` and the image itself will contain it.

    Args:
        prediction: what the base model is said to predict, if it is.
    """
    paths = [str(adapter) for adapter, _ in request.adapters]
    hashes = [hashlib.sha256(adapter_path(path).read_bytes()).hexdigest()[:16] for path in paths]
    shared: dict[str, Any] = {
        "adapter": _value_or_list(paths),
        "adapter_sha256": _value_or_list(hashes),
        "base_model": base_model,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "scheduler": options.scheduler,
        "resolution": options.resolution,
    }
    shared |= {side: value for side in ("width", "height") if (value := getattr(options, side)) is not None}
    if options.max_prompt_chunks > 1:
        shared["max_prompt_chunks"] = options.max_prompt_chunks
    shared |= prediction or {}
    weights = [weight for _, weight in request.adapters]
    if any(weight != 1 for weight in weights):
        shared["adapter_weights"] = weights
    records = []
    for strength in request.strengths:
        settings = shared | {"strength": strength}
        # With several strengths, the same images are generated at each.
        suffix = f"-s{strength:g}" if len(request.strengths) > 1 else ""
        if options.map_dir is not None:
            for semantic in find_maps(options.map_dir, options.default_caption)[: options.max_maps]:
                for k in range(options.num_images):
                    index = "" if options.num_images == 1 else f"-{k:02}"
                    map_fields = {
                        "map": f"maps/{semantic.key}.png",
                        "map_source": str(semantic.path),
                        "map_sha256": hashlib.sha256(semantic.path.read_bytes()).hexdigest()[:16],
                    }
                    name, seed = (
                        f"{semantic.key}{index}{suffix}.png",
                        request.seed + k + zlib.crc32(semantic.key.encode()),
                    )
                    image = {"file_name": name, "prompt": semantic.caption, "seed": seed}
                    records.append({**image, **map_fields, **settings})
        for number, prompt in enumerate(request.prompts):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            for k in range(options.num_images):
                name = f"{number:03}-{slug}-{k:02}{suffix}.png".replace("--", "-")
                records.append({"file_name": name, "prompt": prompt, "seed": request.seed + k, **settings})
    return records


def _value_or_list(values: Sequence[str]) -> Any:
    return None if not values else values[0] if len(values) == 1 else list(values)


def check_same_images(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Refuse a folder with finished images that these records do not contain: their records would be lost.

    Raises:
        InputError
    """
    file = folder / METADATA_NAME
    planned = {record["file_name"] for record in records}
    if not file.is_file():
        foreign = [path.name for path in list_images(folder) if path.name not in planned] if folder.is_dir() else []
        if foreign:
            raise InputError(f"{folder} contains other images, such as {foreign[0]}; pass a new --output_dir.")
        return
    other = [r["file_name"] for _, r in read_json_lines(file, GENERATED) if r["file_name"] not in planned]
    if other:
        raise InputError(f"{folder} contains other images, such as {other[0]}; pass a new --output_dir or remove them.")


def is_done(folder: Path, record: dict[str, Any]) -> bool:
    """Whether an image already exists, complete and generated with the same settings.

    Raises:
        InputError: an image with that name was generated with other settings.
    """
    path = folder / record["file_name"]
    if not path.exists():
        return False
    recorded = None
    try:
        with open_image(path) as image:
            recorded = parse_json(image.info.get(RECORD_KEY, "null"))
            image.verify()
    except UNREADABLE:
        cut = recorded is None and PNG_SIGNATURE.startswith(path.read_bytes()[: len(PNG_SIGNATURE)])
        if recorded == record or cut:
            return False  # damaged, perhaps before its record: generated again
    if recorded != record:
        raise InputError(f"{path} was generated with other settings; pass a new --output_dir or remove the old images.")
    return True


def save_with_record(image: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Write a PNG that contains the record of how it was generated."""
    metadata = PngInfo()
    metadata.add_text(RECORD_KEY, json.dumps(record))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=metadata)


def recorded_in(path: Path) -> Any:
    """The record in an image; None if it has none.

    Raises:
        InputError: the image cannot be read.
    """
    with open_image(path) as image:
        try:
            return parse_json(str(image.info.get(RECORD_KEY, "null")))
        except ValueError:
            return None


def write_metadata(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write ``metadata.jsonl``, one record per line (the imagefolder convention)."""
    write_json_lines(folder / METADATA_NAME, records)


def write_contact_sheet(folder: Path, records: list[dict[str, Any]], most: int = 32) -> Path:
    """Write ``contact_sheet.png``: one row for each of the first prompts or maps; a map comes before its images.

    With several strengths there is one row per image and one column per strength instead.
    """
    from delora_diffusers.image_grid import labelled_grid

    def load_image(name: str) -> Image.Image:
        with open_image(folder / name) as image:
            if image.mode in ("L", "P"):  # class indices, spread over the grey levels
                return image.convert("L").point(lambda value: value * 73 % 256)
            return image.convert("RGB")

    strengths = list(dict.fromkeys(record["strength"] for record in records))
    by_strength = len(strengths) > 1
    rows: dict[tuple, list[Image.Image]] = {}
    for record in records:
        key = (record["prompt"], record.get("map", ""), record["seed"] if by_strength else None)
        if key not in rows and len(rows) == most:
            if by_strength:
                continue
            break
        rows.setdefault(key, [load_image(record["map"])] if "map" in record else []).append(
            load_image(record["file_name"])
        )
    title = f"strength {', '.join(f'{strength:g}' for strength in strengths)}" if by_strength else ""
    labels = [prompt if seed is None else f"{prompt} (seed {seed})" for prompt, _, seed in rows]
    sheet = folder / CONTACT_SHEET_NAME
    grid = labelled_grid(list(zip(labels, rows.values())), title=title)
    with atomic_write(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return sheet
