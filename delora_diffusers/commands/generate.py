"""Draw pictures with adapters: N for each prompt, or for each map, each from a seed of its own."""

import argparse
import json
from pathlib import Path
from typing import Any

from delora_diffusers.commands.arguments import (
    add_adapter_arguments,
    add_base_model_arguments,
    weighted_adapters,
)
from delora_diffusers.errors import InputError
from delora_diffusers.names import MINIATURE, is_miniature

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
    add_adapter_arguments(parser, required=False)
    add_base_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or several prompts")
    prompts.add_argument("--prompts_file", type=Path, help="a prompt on each line")
    prompts.add_argument(
        "--requests_file", type=Path, help="many adapters, a line of JSON for each: see docs/exporting.md"
    )
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
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        default=[1.0],
        help="scales what was learnt; 0 is the base model, several make a sheet of strengths",
    )
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="by default the model's own")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help=f"by default 7.5, with {MINIATURE} 4")
    parser.add_argument("--resolution", type=int, help="by default the model's own")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default accelerate's setting")
    parser.add_argument("--output_dir", type=Path, help="a folder for the pictures")


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


def read_request(options: argparse.Namespace) -> list[Any]:
    """What the flags ask for.

    Raises:
        InputError: flags that do not go together, a file that is not right.
    """
    from delora_diffusers.files.records import Request, read_requests

    strengths = tuple(dict.fromkeys(options.strength))
    if options.requests_file is not None:
        for flag in ("adapter", "adapter_weights", "output_dir"):
            if getattr(options, flag):
                raise InputError(f"--{flag} is in the lines of --requests_file; leave out one of them.")
        return read_requests(options.requests_file, options.seed, strengths)
    if options.output_dir is None:
        raise InputError("no folder for the pictures was given; name one with --output_dir.")
    prompts = [] if options.map_dir is not None else read_prompts(options)
    adapters = tuple(weighted_adapters(options))
    return [Request(adapters, tuple(prompts), options.output_dir, options.seed, strengths)]


def check_maps(options: argparse.Namespace, requests: list[Any]) -> bool:
    """Whether the adapter follows maps.

    Raises:
        InputError: maps are there without such an adapter, or the other way round.
    """
    from delora_diffusers.files.reading import read_header

    paths = [path for request in requests for path, _ in request.adapters]
    following = [path for path in paths if "control_encoder" in read_header(path)]
    if following and options.map_dir is None:
        raise InputError(f"{following[0]} was trained to follow maps; name their folder with --map_dir.")
    if options.map_dir is not None and paths and not following:
        raise InputError(f"{paths[0]} was not trained to follow maps; give --prompt instead of --map_dir.")
    return bool(following)


def run(options: argparse.Namespace) -> None:
    if options.num_images is None:
        options.num_images = 4 if options.map_dir is None else 1
    for flag in ("num_images", "batch_size", "num_inference_steps", "max_maps"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.resolution is not None and (options.resolution < 8 or options.resolution % 8):
        raise InputError(f"--resolution {options.resolution} is not a multiple of 8; use a multiple of 8.")
    if options.prompts_file is not None:
        read_prompts(options)  # answers before torch is imported

    from delora_diffusers.files.records import is_done, plan, write_contact_sheet, write_metadata
    from delora_diffusers.pipelines.adapted_pipeline import base_model_of

    requests = read_request(options)
    follows_maps = check_maps(options, requests)
    adapters = list(dict.fromkeys(path for request in requests for path, _ in request.adapters))
    base_model = base_model_of(adapters, options.pretrained_model_name_or_path) or MINIATURE
    if options.guidance_scale is None:
        options.guidance_scale = 4.0 if is_miniature(base_model) else 7.5
    planned = [(request, plan(request, options, base_model)) for request in requests]
    batches, missing = [], 0
    for request, records in planned:
        for strength in request.strengths:
            these = [r for r in records if r["strength"] == strength and not is_done(request.output_dir, r)]
            missing += len(these)
            batches += [(request, these[i : i + options.batch_size]) for i in range(0, len(these), options.batch_size)]
    if follows_maps:
        from delora_diffusers.files.reading import read_header
        from delora_diffusers.maps import paint, read_map

        palette = read_header(adapters[0])["control_encoder"]["palette"]
        for source in dict.fromkeys(record["map_source"] for _, batch in batches for record in batch):
            paint(read_map(Path(source), source), palette, source)

    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    if missing:
        _draw(
            options, base_model, adapters, batches[accelerator.process_index :: accelerator.num_processes], accelerator
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for request, records in planned:
            write_metadata(request.output_dir, records)
            sheet = write_contact_sheet(request.output_dir, records)
        pictures = sum(len(records) for _, records in planned)
        where = requests[0].output_dir if len(requests) == 1 else f"{len(requests)} folders"
        print(f"{pictures} pictures in {where} ({missing} new); look at {sheet}")


def _draw(options: argparse.Namespace, base_model: str, adapters: list[Path], batches: list, accelerator: Any) -> None:
    """Draw batches, (request, records at one strength) each."""
    import diffusers
    import torch
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from tqdm.auto import tqdm

    from delora_diffusers.atomic import atomic_write
    from delora_diffusers.files.records import RECORD_KEY
    from delora_diffusers.maps import crop_square, read_map
    from delora_diffusers.pipelines.adapted_pipeline import AdaptedPipeline
    from delora_diffusers.pipelines.base_model import load_pipeline
    from delora_diffusers.pipelines.sampling import sample_images

    pipeline = load_pipeline(base_model, revision=options.revision, variant=options.variant)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    adapted = AdaptedPipeline(pipeline, adapters, accelerator.device, dtype)
    if options.scheduler is not None:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[options.scheduler]).from_config(pipeline.scheduler.config)
    side = options.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    in_use = None
    for request, batch in tqdm(batches, desc="generating", disable=not accelerator.is_local_main_process):
        strength = batch[0]["strength"]
        wanted = [(path, weight * strength) for path, weight in request.adapters]
        if wanted != in_use:
            adapted.use(wanted)
            in_use = wanted
        maps = (
            [crop_square(read_map(Path(r["map_source"]), r["map_source"]), side) for r in batch]
            if options.map_dir is not None
            else None
        )
        pictures = sample_images(
            pipeline,
            [record["seed"] for record in batch],
            options.resolution if maps is None else side,
            maps=maps,
            prompt=[record["prompt"] for record in batch],
            # None for none: XL's base model then takes zeros for it.
            negative_prompt=[options.negative_prompt] * len(batch) if options.negative_prompt else None,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        )
        for record, picture in zip(batch, pictures):
            said = PngInfo()
            said.add_text(RECORD_KEY, json.dumps(record))
            with atomic_write(request.output_dir / record["file_name"]) as temporary:
                picture.save(temporary, format="PNG", pnginfo=said)
        for record, one in zip(batch, maps or []):
            with atomic_write(request.output_dir / record["map"]) as temporary:
                Image.fromarray(one).save(temporary, format="PNG")
