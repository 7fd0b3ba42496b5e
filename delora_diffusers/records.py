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

from delora_diffusers.errors import InputError
from delora_diffusers.files import written_whole
from delora_diffusers.reading import adapter_path

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
        raise InputError(f"--requests_file {file} is not a file; write a line for each adapter.")
    found: list[Request] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = {"seed": seed, "adapter": None} | json.loads(line)
            prompts, adapter = record["prompts"], record["adapter"]
            right = set(record) <= {"adapter", "prompts", "output_dir", "seed"} and isinstance(record["seed"], int)
            right = right and bool(prompts) and all(isinstance(prompt, str) for prompt in prompts)
            adapters = () if adapter is None else ((Path(adapter), 1.0),)
            request = Request(adapters, tuple(prompts), Path(record["output_dir"]), record["seed"], strengths)
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise InputError(
                f'{file} line {number} is not a record like {{"adapter": "runs/dog", "prompts": ["a sks dog"], '
                '"output_dir": "pictures/dog"}, with seed or without; mend it.'
            )
        found.append(request)
    if not found:
        raise InputError(f"--requests_file {file} asks for nothing; write a line for each adapter.")
    places = [request.output_dir.resolve() for request in found]
    twice = next((r.output_dir for r, place in zip(found, places) if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"{file} names the output_dir {twice} for two requests; give each its own.")
    return found


def read_maps(folder: Path, default_caption: str | None) -> list[tuple[Path, str]]:
    """(map file, caption) in order of name.

    The folder is laid out as for training (``metadata.jsonl`` with ``map`` and ``text``, or ``maps/`` beside
    ``images/``), or holds the maps themselves; captions are in its ``metadata.jsonl`` or in ``NAME.txt`` files.

    Raises:
        InputError: no folder, no map, a map without a caption.
    """
    if not folder.is_dir():
        raise InputError(f"--map_dir {folder} is not a folder; name the folder that holds the maps.")
    file, captions = folder / "metadata.jsonl", {}
    place = next((folder / name for name in ("maps", "segm") if (folder / name).is_dir()), folder)
    paths = sorted(p for p in place.iterdir() if p.suffix.lower() in (".png", ".bmp", ".tif", ".tiff", ".gif"))
    if file.is_file():
        try:
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            captions = {Path(record["file_name"]).stem: record.get("text") for record in records}
            if any("map" in record for record in records):
                paths = [folder / record["map"] for record in records]
                captions = {Path(record["map"]).stem: record.get("text") for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} has a line without file_name, map and text ({error}); mend it.") from error
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        what = f"{len(missing)} maps are missing, {missing[0]} first" if missing else "there is no map"
        raise InputError(f"--map_dir {folder}: {what}; put the maps there as PNG files.")
    found, bare = [], []
    for path in paths:
        texts = [path.with_suffix(".txt"), folder / "images" / f"{path.stem}.txt"]
        beside = next((text.read_text(encoding="utf-8").strip() for text in texts if text.is_file()), default_caption)
        caption = beside if captions.get(path.stem) is None else captions[path.stem]
        bare += [path.name] if caption is None else []
        found.append((path, caption or ""))
    if bare:
        raise InputError(f"{len(bare)} maps have no caption, {bare[0]} first; add captions, or give --default_caption.")
    return found


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
            for path, caption in read_maps(options.map_dir, options.default_caption)[: options.max_maps]:
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
    with written_whole(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_contact_sheet(folder: Path, records: list[dict[str, Any]], most: int = 32) -> Path:
    """Write ``contact_sheet.png``: a row for each of the first prompts or maps, a map before its pictures.

    With several strengths a row for each picture instead, a column for each strength.
    """
    from PIL import Image

    from delora_diffusers.images import labelled_grid

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
    with written_whole(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return sheet
