"""Draw pictures with an adapter: N for each prompt, or for each map, each from a seed of its own."""

import argparse
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

from delora_diffusers.base_model import MINIATURE, is_miniature
from delora_diffusers.errors import InputError

RECORD_KEY = "delora_diffusers"
"""The PNG text entry that says how a picture was made."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", type=Path, help="an output folder or the file in it; none for the base model")
    parser.add_argument("--pretrained_model_name_or_path", help="instead of the base model recorded in the adapter")
    parser.add_argument("--revision")
    parser.add_argument("--variant")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or several prompts")
    prompts.add_argument("--prompts_file", type=Path, help="a prompt on each line")
    prompts.add_argument(
        "--map_dir", type=Path, help="maps and captions, for an adapter of train_controlnet_map2img.py"
    )
    parser.add_argument("--default_caption", help="of maps that have none")
    parser.add_argument("--max_maps", type=int, help="only so many")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument(
        "--num_images", type=int, help="pictures of each prompt, by default 4; of each map, by default 1"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="picture k of every prompt has seed SEED + k; maps add a hash of their name"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="scales what was learnt; 0 is the base model")
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="by default the model's own")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help=f"by default 7.5, with {MINIATURE} 4")
    parser.add_argument("--resolution", type=int, help="by default the model's own")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default accelerate's setting")
    parser.add_argument("--output_dir", type=Path, required=True)


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts of the flags or of the file, without blank lines.

    Raises:
        InputError: a file that is missing or has no prompt.
    """
    if options.prompt is not None:
        return options.prompt
    if not options.prompts_file.is_file():
        raise InputError(
            f"--prompts_file {options.prompts_file} is not a file; give a text file, a prompt on each line."
        )
    prompts = [line.strip() for line in options.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"--prompts_file {options.prompts_file} holds no prompt; write one on each line.")
    return prompts


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


def plan(options: argparse.Namespace, prompts: list[str], base_model: str | None) -> list[dict[str, Any]]:
    """The record of every picture, in order: what ``metadata.jsonl`` and the picture itself will say."""
    adapter_hash = None
    if options.adapter is not None:
        from delora_diffusers.files import adapter_path

        adapter_hash = hashlib.sha256(adapter_path(options.adapter).read_bytes()).hexdigest()[:16]
    same = {
        "adapter": None if options.adapter is None else str(options.adapter),
        "adapter_sha256": adapter_hash,
        "base_model": base_model,
        "strength": options.strength,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "negative_prompt": options.negative_prompt,
        "scheduler": options.scheduler,
        "resolution": options.resolution,
    }
    if options.map_dir is not None:
        maps = read_maps(options.map_dir, options.default_caption)[: options.max_maps]
        return [
            {
                "file_name": f"{path.stem}.png" if options.num_images == 1 else f"{path.stem}-{k:02}.png",
                "prompt": caption,
                "seed": options.seed + k + zlib.crc32(path.stem.encode()),
                "map": f"maps/{path.stem}.png",
                "map_source": str(path),
                "map_sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
                **same,
            }
            for path, caption in maps
            for k in range(options.num_images)
        ]
    records = []
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        for k in range(options.num_images):
            name = f"{number:03}-{slug}-{k:02}.png".replace("--", "-")
            records.append({"file_name": name, "prompt": prompt, "seed": options.seed + k, **same})
    return records


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


def run(options: argparse.Namespace) -> None:
    if options.num_images is None:
        options.num_images = 4 if options.map_dir is None else 1
    for flag in ("num_images", "batch_size", "num_inference_steps", "max_maps"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.resolution is not None and (options.resolution < 8 or options.resolution % 8):
        raise InputError(f"--resolution {options.resolution} is not a multiple of 8; use a multiple of 8.")
    prompts = [] if options.map_dir is not None else read_prompts(options)
    base_model, header = options.pretrained_model_name_or_path, {}
    if options.adapter is not None:
        from delora_diffusers.files import read_header

        header = read_header(options.adapter)
        base_model = base_model or header["base_model"]
    follows_maps = "control_encoder" in header
    if follows_maps and options.map_dir is None:
        raise InputError(f"{options.adapter} was trained to follow maps; name their folder with --map_dir.")
    if options.map_dir is not None and options.adapter is not None and not follows_maps:
        raise InputError(f"{options.adapter} was not trained to follow maps; give --prompt instead of --map_dir.")
    base_model = base_model or MINIATURE
    if options.guidance_scale is None:
        options.guidance_scale = 4.0 if is_miniature(base_model) else 7.5
    records = plan(options, prompts, base_model)
    folder: Path = options.output_dir
    missing = [record for record in records if not is_done(folder, record)]
    if follows_maps:
        from delora_diffusers.control import painted, read_map

        palette = header["control_encoder"]["palette"]
        for source in dict.fromkeys(record["map_source"] for record in missing):
            painted(read_map(Path(source)), palette, source)

    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    batches = [missing[i : i + options.batch_size] for i in range(0, len(missing), options.batch_size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    if missing:
        _draw(options, base_model, mine, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_metadata(folder, records)
        sheet = write_contact_sheet(folder, records)
        print(f"{len(records)} pictures in {folder} ({len(missing)} new); look at {sheet}")


def _draw(options: argparse.Namespace, base_model: str | None, batches: list[list[dict]], accelerator) -> None:
    import diffusers
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from tqdm.auto import tqdm

    from delora_diffusers.adapted_pipeline import load_adapted_pipeline
    from delora_diffusers.control import fitted, read_map
    from delora_diffusers.files import written_whole
    from delora_diffusers.sampling import sample_pictures

    pipeline = load_adapted_pipeline(
        options.adapter,
        base_model,
        strength=options.strength,
        revision=options.revision,
        variant=options.variant,
    )
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipeline.to(accelerator.device, dtype)
    if options.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[options.scheduler]).from_config(pipeline.scheduler.config)
    side = options.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    for batch in tqdm(batches, desc="generating", disable=not accelerator.is_local_main_process):
        maps = [fitted(read_map(Path(r["map_source"])), side) for r in batch] if options.map_dir is not None else None
        pictures = sample_pictures(
            pipeline,
            [record["seed"] for record in batch],
            options.resolution if maps is None else side,
            maps=maps,
            prompt=[record["prompt"] for record in batch],
            negative_prompt=[options.negative_prompt] * len(batch),
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        )
        for record, picture in zip(batch, pictures):
            said = PngInfo()
            said.add_text(RECORD_KEY, json.dumps(record))
            with written_whole(options.output_dir / record["file_name"]) as temporary:
                picture.save(temporary, format="PNG", pnginfo=said)
        for record, one in zip(batch, maps or []):
            with written_whole(options.output_dir / record["map"]) as temporary:
                Image.fromarray(one).save(temporary, format="PNG")


def write_metadata(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write ``metadata.jsonl``, a record on each line (the imagefolder convention)."""
    from delora_diffusers.files import written_whole

    with written_whole(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_contact_sheet(folder: Path, records: list[dict[str, Any]], most: int = 32) -> Path:
    """Write ``contact_sheet.png``: a row for each of the first prompts or maps, a map before its pictures."""
    from PIL import Image

    from delora_diffusers.files import written_whole
    from delora_diffusers.images import labelled_grid

    def picture(name: str) -> Image.Image:
        with Image.open(folder / name) as image:
            if image.mode in ("L", "P"):  # indices: spread over the greys
                return image.convert("L").point(lambda value: value * 73 % 256)
            return image.convert("RGB")

    rows: dict[tuple[str, str], list[Image.Image]] = {}
    for record in records:
        key = (record["prompt"], record.get("map", ""))
        if key not in rows and len(rows) == most:
            break
        rows.setdefault(key, [picture(record["map"])] if "map" in record else []).append(picture(record["file_name"]))
    sheet = folder / "contact_sheet.png"
    grid = labelled_grid([(prompt, pictures) for (prompt, _), pictures in rows.items()])
    with written_whole(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return sheet
