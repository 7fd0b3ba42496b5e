"""Draw pictures with an adapter: N for each prompt, each from a seed of its own."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
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
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--num_images", type=int, default=4, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="picture k of every prompt has seed SEED + k")
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


def plan(options: argparse.Namespace, prompts: list[str], base_model: str | None) -> list[dict[str, Any]]:
    """The record of every picture, in order: what ``metadata.jsonl`` and the picture itself will say."""
    adapter_hash = None
    if options.adapter is not None:
        from delora_diffusers.files import adapter_path

        adapter_hash = hashlib.sha256(adapter_path(options.adapter).read_bytes()).hexdigest()[:16]
    records = []
    for number, prompt in enumerate(prompts):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
        for k in range(options.num_images):
            records.append(
                {
                    "file_name": f"{number:03}-{slug}-{k:02}.png".replace("--", "-"),
                    "prompt": prompt,
                    "seed": options.seed + k,
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
            )
    return records


def is_done(folder: Path, record: dict[str, Any]) -> bool:
    """Whether a picture is there already, made in the very same way.

    Raises:
        InputError: a picture of that name was made in another way.
    """
    from PIL import Image, UnidentifiedImageError

    path = folder / record["file_name"]
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            found = json.loads(image.info.get(RECORD_KEY, "null"))
    except (UnidentifiedImageError, OSError, ValueError):
        found = None
    if found != record:
        raise InputError(f"{path} was made with other settings; name a new --output_dir, or remove the old pictures.")
    return True


def run(options: argparse.Namespace) -> None:
    for flag in ("num_images", "batch_size", "num_inference_steps"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.resolution is not None and (options.resolution < 8 or options.resolution % 8):
        raise InputError(f"--resolution {options.resolution} is not a multiple of 8; use a multiple of 8.")
    prompts = read_prompts(options)
    base_model = options.pretrained_model_name_or_path
    if options.adapter is not None:
        from delora_diffusers.files import read_header

        base_model = base_model or read_header(options.adapter)["base_model"]
    base_model = base_model or MINIATURE
    if options.guidance_scale is None:
        options.guidance_scale = 4.0 if is_miniature(base_model) else 7.5
    records = plan(options, prompts, base_model)
    folder: Path = options.output_dir
    missing = [record for record in records if not is_done(folder, record)]

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
        sheet = write_contact_sheet(folder, prompts, records)
        print(f"{len(records)} pictures in {folder} ({len(missing)} new); look at {sheet}")


def _draw(options: argparse.Namespace, base_model: str | None, batches: list[list[dict]], accelerator) -> None:
    import diffusers
    import torch
    from PIL.PngImagePlugin import PngInfo
    from tqdm.auto import tqdm

    from delora_diffusers.adapted_pipeline import load_adapted_pipeline
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
    for batch in tqdm(batches, desc="generating", disable=not accelerator.is_local_main_process):
        pictures = sample_pictures(
            pipeline,
            [record["seed"] for record in batch],
            options.resolution,
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


def write_metadata(folder: Path, records: list[dict[str, Any]]) -> None:
    """Write ``metadata.jsonl``, a record on each line (the imagefolder convention)."""
    from delora_diffusers.files import written_whole

    with written_whole(folder / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")


def write_contact_sheet(folder: Path, prompts: list[str], records: list[dict[str, Any]]) -> Path:
    """Write ``contact_sheet.png``: a row for each prompt."""
    from PIL import Image

    from delora_diffusers.files import written_whole
    from delora_diffusers.images import labelled_grid

    def pictures(number: int) -> Iterator[Image.Image]:
        each = len(records) // len(prompts)
        for record in records[number * each : (number + 1) * each]:
            with Image.open(folder / record["file_name"]) as image:
                yield image.convert("RGB")

    sheet = folder / "contact_sheet.png"
    grid = labelled_grid([(prompt, list(pictures(number))) for number, prompt in enumerate(prompts)])
    with written_whole(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return sheet
