"""Generate images with adapters: N images per prompt or per map, each with its own seed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delora_diffusers.commands.arguments import add_adapter_arguments, add_base_model_arguments
from delora_diffusers.commands.generate_model import SCHEDULERS, SIDES, Loaded, load_model, smaller
from delora_diffusers.commands.generate_requests import (
    Batch,
    Planned,
    build_requests,
    check_maps,
    check_palette,
    missing_batches,
    of_equal_length,
    plan_images,
    read_prompts,
    scaled,
)
from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import PROMPT_CHUNKS_HELP, check_prompt_chunks, check_side
from delora_diffusers.families.quantization import add_base_precision_argument, check_base_precision
from delora_diffusers.names import MINIATURE, is_miniature
from delora_diffusers.outputs import check_writable, held_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, required=False)
    add_base_model_arguments(parser, prediction=True)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or several prompts")
    prompts.add_argument(
        "--prompts_file", type=Path, help="a text file with one prompt per line; a line that starts with # is a comment"
    )
    prompts.add_argument(
        "--requests_file", type=Path, help="requests for several adapters, one JSON object per line: docs/exporting.md"
    )
    prompts.add_argument(
        "--map_dir",
        type=Path,
        help="folder of maps and captions, for an adapter trained by train_controlnet_map2img.py",
    )
    parser.add_argument("--default_caption", help="caption for maps that have none")
    parser.add_argument("--max_maps", type=int, help="use only the first N maps")
    parser.add_argument("--negative_prompt", default="", help="what the images should not show")
    parser.add_argument("--max_prompt_chunks", type=int, default=1, help=PROMPT_CHUNKS_HELP)
    parser.add_argument("--num_images", type=int, help="images per prompt (default: 4) or per map (default: 1)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image k of each prompt has seed SEED + k; for maps a hash of the file name is added; default: 0",
    )
    parser.add_argument(
        "--strength",
        type=float,
        nargs="+",
        default=[1.0],
        help="scales the learned update; 0 is the base model, several values make a sheet of strengths; default: 1",
    )
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="default: the base model's scheduler")
    parser.add_argument("--num_inference_steps", type=int, default=50, help="denoising steps; default: 50")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        help=f"default: the pipeline's usual one, for example 7.5, or 4 with {MINIATURE}",
    )
    parser.add_argument("--resolution", type=int, help="side length in pixels; default: the base model's")
    parser.add_argument("--width", type=int, help="in pixels; default: --resolution")
    parser.add_argument("--height", type=int, help="in pixels; default: --resolution")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch; default: 4")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's setting")
    add_base_precision_argument(parser)
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the blocks of the denoiser in host memory; needs less, and is slower",
    )
    parser.add_argument("--output_dir", type=Path, help="folder for the images")


def run(options: argparse.Namespace, load: Callable[..., Loaded] = load_model) -> None:
    """Generate the images that the flags describe.

    Args:
        load: what else loads the model, for a process that keeps the model from one command to the next.
    """
    _check_numbers(options)
    check_base_precision(options)
    if options.prompts_file is not None:
        read_prompts(options)  # rejects a bad file before torch is imported

    from delora_diffusers.families.pipeline_files import model_index
    from delora_diffusers.families.table import family_of
    from delora_diffusers.pipelines.adapted_pipeline import base_model_of

    requests = build_requests(options)
    follows_maps = check_maps(options, requests)
    adapters = list(dict.fromkeys(path for request in requests for path, _ in request.adapters))
    base_model = base_model_of(
        adapters,
        options.pretrained_model_name_or_path,
        options.revision,
        options.variant,
        options.model_config,
        options.prediction_type,
        options.rescale_betas_zero_snr,
    )
    index = model_index(base_model.name, **base_model.files())
    family = family_of(index["_class_name"])
    if options.negative_prompt and not family.has_negative_prompt(index):
        raise InputError("--negative_prompt has no effect on this model, which has no negative prompt; leave it out.")
    if options.scheduler is not None and family.IS_FLOW:
        raise InputError(f"--scheduler {options.scheduler} is not for flow models such as this one; leave it out.")
    check_prompt_chunks(family, base_model.name, options.max_prompt_chunks)
    if options.guidance_scale is None:
        options.guidance_scale = 4.0 if is_miniature(base_model.name) else family.GUIDANCE_SCALE
    for request in requests:
        check_writable(request.output_dir, "--output_dir")
    with held_outputs([request.output_dir for request in requests]):
        planned = plan_images(requests, options, base_model)
        batches = missing_batches(planned, options.batch_size)
        if follows_maps:
            check_palette(adapters[0], batches)

        from delora_diffusers.launching import launched_accelerator

        accelerator = launched_accelerator(mixed_precision=options.mixed_precision)
        accelerator.wait_for_everyone()  # all processes list the missing images before any process writes one
        if batches:
            share = batches[accelerator.process_index :: accelerator.num_processes]
            loaded = load(options, base_model, adapters, share, accelerator)
            _generate(options, loaded, share, accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _write_results(planned, sum(len(batch.missing) for batch in batches))


def _check_numbers(options: argparse.Namespace) -> None:
    if options.num_images is None:
        options.num_images = 4 if options.map_dir is None else 1
    for flag in ("num_images", "batch_size", "num_inference_steps", "max_maps", "max_prompt_chunks"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    for flag, values in (("strength", options.strength), ("guidance_scale", [options.guidance_scale or 0.0])):
        wrong = next((value for value in values if not math.isfinite(value)), None)
        if wrong is not None:
            raise InputError(f"--{flag} is {wrong}; give finite numbers.")
    if not -(2**62) < options.seed < 2**62:
        raise InputError(f"--seed {options.seed} is too large; choose a smaller one.")
    for flag in SIDES:
        side = getattr(options, flag)
        if side is not None:
            check_side(flag, side)


def _generate(options: argparse.Namespace, loaded: Loaded, batches: list[Batch], accelerator: Any) -> None:
    """Generate the images of these batches and write them with their records."""
    from PIL import Image
    from tqdm.auto import tqdm

    from delora_diffusers.atomic import atomic_write
    from delora_diffusers.files.records import save_with_record
    from delora_diffusers.maps import crop_map, read_map
    from delora_diffusers.memory import explain_out_of_memory
    from delora_diffusers.pipelines.adapted_pipeline import use_control
    from delora_diffusers.pipelines.offload import offload_blocks
    from delora_diffusers.pipelines.sampling import default_resolution, sample_images

    model, adapted, prompts = loaded
    pipeline, device, denoiser = model.pipeline, accelerator.device, adapted.model
    savings = ["--batch_size 1", *smaller(accelerator), "a smaller --resolution"]
    side = options.resolution or default_resolution(pipeline, denoiser)
    width, height = options.width or side, options.height or side
    batches = [part for batch in batches for part in of_equal_length(batch, prompts)]
    in_use: list[tuple[Path, float]] | None = None
    for batch in tqdm(batches, desc="generating", disable=not accelerator.is_local_main_process):
        request, records, missing = batch
        adapters_of_batch = scaled(batch)
        if adapters_of_batch != in_use:
            in_use = adapters_of_batch
            with explain_out_of_memory("loading the adapter", smaller(accelerator)):
                adapted.use(in_use)
            if options.offload:
                offload_blocks(denoiser, device)
            use_control(denoiser, in_use)
        maps = None
        if options.map_dir is not None:
            maps = [crop_map(read_map(Path(r["map_source"]), r["map_source"]), (width, height)) for r in records]
        with explain_out_of_memory(f"generating {len(records)} images of {width} x {height} pixels at once", savings):
            images = sample_images(
                pipeline,
                [record["seed"] for record in records],
                (width, height),
                maps=maps,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                **prompts.arguments([record["prompt"] for record in records], adapters_of_batch, device),
            )
        for record, image in zip(records, images):
            if record not in missing:
                continue
            save_with_record(image, request.output_dir / record["file_name"], record)
        for record, semantic in zip(records, maps or []):
            with atomic_write(request.output_dir / record["map"]) as temporary:
                Image.fromarray(semantic).save(temporary, format="PNG")


def _write_results(planned: list[Planned], new: int) -> None:
    from delora_diffusers.files.records import write_contact_sheet, write_metadata

    for request, records in planned:
        write_metadata(request.output_dir, records)
        sheet = write_contact_sheet(request.output_dir, records)
    total = sum(len(records) for _, records in planned)
    folders = planned[0][0].output_dir if len(planned) == 1 else f"{len(planned)} folders"
    print(f"{total} {'image' if total == 1 else 'images'} in {folders} ({new} new); see {sheet}")
