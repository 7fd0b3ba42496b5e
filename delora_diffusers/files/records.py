"""What a command draws: a record for each picture, which goes into the picture and into ``metadata.jsonl``."""

import argparse
import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.files.reading import adapter_path
from delora_diffusers.json_lines import REQUESTS, read_json_lines, write_json_lines
from delora_diffusers.maps import find_maps
from delora_diffusers.names import METADATA_NAME

RECORD_KEY = "delora_diffusers"
"""The PNG text entry that says how a picture was made."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Pictures of some prompts, or maps, with one set of adapters.

    Attributes:
        adapters: with their weights; none for the base model. strengths: each of them scales all adapters.
        seed: picture k of every prompt has seed + k.
    """

    adapters: tuple[tuple[Path, float], ...]
    prompts: tuple[str, ...]
    output_dir: Path
    seed: int
    strengths: tuple[float, ...] = (1.0,)


def read_requests(file: Path, seed: int, strengths: tuple[float, ...]) -> list[Request]:
    """Requests from lines like ``{"adapter": "runs/dog", "prompts": ["a sks dog"], "output_dir": "out", "seed": 0}``.

    Raises:
        InputError: no such file, a line that is no such record, two lines with one output folder.
    """
    if not file.is_file():
        raise InputError(f"--requests_file {file} is not a file; write one line for each adapter.")
    requests: list[Request] = []
    for number, record in read_json_lines(file, REQUESTS):
        record = {"seed": seed, "adapter": None} | record
        prompts, adapter = record["prompts"], record["adapter"]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f"{file} line {number} needs prompts, a list of at least one text; fix it.")
        adapters = () if adapter is None else ((Path(adapter), 1.0),)
        requests.append(Request(adapters, tuple(prompts), Path(record["output_dir"]), record["seed"], strengths))
    if not requests:
        raise InputError(f"--requests_file {file} is empty; write one line for each adapter.")
    folders = [request.output_dir.resolve() for request in requests]
    repeated = next((r.output_dir for r, folder in zip(requests, folders) if folders.count(folder) > 1), None)
    if repeated is not None:
        raise InputError(f"{file} gives the output_dir {repeated} to two requests; give each its own.")
    return requests


def plan(request: Request, options: argparse.Namespace, base_model: str | None) -> list[dict[str, Any]]:
    """The record of every picture, in order: what ``metadata.jsonl`` and the picture itself will say."""
    paths = [str(adapter) for adapter, _ in request.adapters]
    hashes = [hashlib.sha256(adapter_path(path).read_bytes()).hexdigest()[:16] for path in paths]
    same: dict[str, Any] = {
        "adapter": _one_or_all(paths),
        "adapter_sha256": _one_or_all(hashes),
        "base_model": base_model,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "scheduler": options.scheduler,
        "resolution": options.resolution,
    }
    weights = [weight for _, weight in request.adapters]
    if any(weight != 1 for weight in weights):
        same["adapter_weights"] = weights
    records = []
    for strength in request.strengths:
        said = same | {"strength": strength}
        # A sheet of strengths has the same pictures at each.
        mark = f"-s{strength:g}" if len(request.strengths) > 1 else ""
        if options.map_dir is not None:
            for path, caption in find_maps(options.map_dir, options.default_caption)[: options.max_maps]:
                for k in range(options.num_images):
                    which = "" if options.num_images == 1 else f"-{k:02}"
                    of_map = {
                        "map": f"maps/{path.stem}.png",
                        "map_source": str(path),
                        "map_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
                    }
                    name, seed = f"{path.stem}{which}{mark}.png", request.seed + k + zlib.crc32(path.stem.encode())
                    records.append({"file_name": name, "prompt": caption, "seed": seed, **of_map, **said})
        for number, prompt in enumerate(request.prompts):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            for k in range(options.num_images):
                name = f"{number:03}-{slug}-{k:02}{mark}.png".replace("--", "-")
                records.append({"file_name": name, "prompt": prompt, "seed": request.seed + k, **said})
    return records


def _one_or_all(values: Sequence[str]) -> Any:
    return None if not values else values[0] if len(values) == 1 else list(values)


def is_done(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a picture is there already, whole and made in the very same way.

    Raises:
        InputError: a picture of that name was made in another way.
    """
    from PIL import Image, UnidentifiedImageError

    path = folder / record["file_name"]
    if not path.exists():
        return False
    found = None
    try:
        with Image.open(path) as image:
            found = json.loads(image.info.get(RECORD_KEY, "null"))
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        if found == record:
            return False  # ours, but damaged: drawn anew
    if found != record:
        raise InputError(f"{path} was made with other settings; name a new --output_dir, or remove the old pictures.")
    return True


def write_metadata(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write ``metadata.jsonl``, a record on each line (the imagefolder convention)."""
    write_json_lines(folder / METADATA_NAME, records)


def write_contact_sheet(folder: Path, records: list[dict[str, Any]], most: int = 32) -> Path:
    """Write ``contact_sheet.png``: a row for each of the first prompts or maps, a map before its pictures.

    With several strengths a row for each picture instead, a column for each strength.
    """
    from PIL import Image

    from delora_diffusers.image_grid import labelled_grid

    def picture(name: str) -> Image.Image:
        with Image.open(folder / name) as image:
            if image.mode in ("L", "P"):  # indices: spread over the greys
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
        rows.setdefault(key, [picture(record["map"])] if "map" in record else []).append(picture(record["file_name"]))
    title = f"strength {', '.join(f'{strength:g}' for strength in strengths)}" if by_strength else ""
    labels = [prompt if seed is None else f"{prompt} (seed {seed})" for prompt, _, seed in rows]
    sheet = folder / "contact_sheet.png"
    grid = labelled_grid(list(zip(labels, rows.values())), title=title)
    with atomic_write(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return sheet
