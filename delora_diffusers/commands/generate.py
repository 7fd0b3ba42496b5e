"""Generate images with adapters: N images per prompt or per map, each with its own seed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delora_diffusers.commands.arguments import (
    add_adapter_arguments,
    add_base_model_arguments,
    weighted_adapters,
)
from delora_diffusers.errors import InputError, reason
from delora_diffusers.families.checks import PROMPT_CHUNKS_HELP, check_patches, check_prompt_chunks, check_side
from delora_diffusers.families.quantization import (
    PACKAGES,
    add_base_precision_argument,
    check_base_precision,
    quantization_config,
)
from delora_diffusers.names import INSTANCE, MINIATURE, is_miniature
from delora_diffusers.outputs import check_writable, held_outputs
from delora_diffusers.text_files import is_text, read_lines

if TYPE_CHECKING:
    from delora_diffusers.families.loading import OpenModel
    from delora_diffusers.pipelines.adapted_pipeline import AdaptedModel, BaseModel
    from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts

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

SIDES = ("resolution", "width", "height")

Records = list[dict[str, Any]]
Planned = tuple[Any, Records]
"""A ``Request`` and the records of all its images; see ``files/records.py``."""


class Batch(NamedTuple):
    """Images that are generated together.

    Attributes:
        request: the ``Request`` that they belong to.
        records: of all images of the batch. missing: of those that are written.
    """

    request: Any
    records: Records
    missing: Records


class Loaded(NamedTuple):
    """A base model that is ready to sample from: its denoiser and autoencoder are on the device.

    Attributes:
        adapted: the denoiser with the adapters of all batches. prompts: those of all batches.
    """

    model: "OpenModel"
    adapted: "AdaptedModel"
    prompts: "EncodedPrompts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_adapter_arguments(parser, required=False)
    add_base_model_arguments(parser, prediction=True)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or several prompts")
    prompts.add_argument("--prompts_file", type=Path, help="a text file with one prompt per line")
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


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts from ``--prompt`` or ``--prompts_file``, without blank lines.

    Raises:
        InputError: the file is missing or contains no prompt, or a prompt has a placeholder.
    """
    prompts = _given_prompts(options)
    if any(INSTANCE in prompt for prompt in prompts):
        raise InputError(f"a prompt contains {INSTANCE}, which stands for a name in training only; write the name.")
    return prompts


def _given_prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        broken = next((prompt for prompt in options.prompt if not is_text(prompt)), None)
        if broken is not None:
            raise InputError(f"--prompt {broken!r} is not UTF-8; set the terminal's encoding, or use --prompts_file.")
        return options.prompt
    if not options.prompts_file.is_file():
        raise InputError(
            f"--prompts_file {options.prompts_file} is not a file; give a text file with one prompt per line."
        )
    prompts = [line for _, line in read_lines(options.prompts_file)]
    if not prompts:
        raise InputError(f"--prompts_file {options.prompts_file} contains no prompt; write one prompt per line.")
    return prompts


def build_requests(options: argparse.Namespace) -> list[Any]:
    """The requests described by the flags or by ``--requests_file``.

    Raises:
        InputError: flags that cannot be combined, or an invalid file.
    """
    from delora_diffusers.files.records import Request, read_requests

    strengths = tuple(dict.fromkeys(options.strength))
    if options.requests_file is not None:
        for flag in ("adapter", "adapter_weights", "output_dir"):
            if getattr(options, flag):
                raise InputError(f"--{flag} cannot be combined with --requests_file; leave out one of them.")
        return read_requests(options.requests_file, options.seed, strengths)
    if options.output_dir is None:
        raise InputError("no folder for the images was given; specify one with --output_dir.")
    prompts = [] if options.map_dir is not None else read_prompts(options)
    adapters = tuple(weighted_adapters(options))
    return [Request(adapters, tuple(prompts), options.output_dir, options.seed, strengths)]


def check_maps(options: argparse.Namespace, requests: list[Any]) -> bool:
    """Whether the adapter follows maps.

    Raises:
        InputError: maps are given to an adapter that does not follow maps, or the other way round.
    """
    from delora_diffusers.files.reading import read_header

    paths = [path for request in requests for path, _ in request.adapters]
    following = [path for path in paths if "control_encoder" in read_header(path)]
    if following and options.map_dir is None:
        raise InputError(f"{following[0]} was trained to follow maps; give a folder of maps with --map_dir.")
    if options.map_dir is not None and paths and not following:
        raise InputError(f"{paths[0]} was not trained to follow maps; give --prompt instead of --map_dir.")
    return bool(following)


def run(options: argparse.Namespace, load: "Callable[..., Loaded] | None" = None) -> None:
    """Generate the images that the flags describe.

    Args:
        load: instead of ``load_model``, for a process that keeps the model from one command to the next.
    """
    _check_numbers(options)
    check_base_precision(options)
    if options.prompts_file is not None:
        read_prompts(options)  # rejects a bad file before torch is imported

    from delora_diffusers.families.loading import model_index
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
        planned = _plan(requests, options, base_model)
        batches = _missing_batches(planned, options.batch_size)
        if follows_maps:
            _check_palette(adapters[0], batches)

        from delora_diffusers.launching import launched_accelerator

        accelerator = launched_accelerator(mixed_precision=options.mixed_precision)
        accelerator.wait_for_everyone()  # all processes list the missing images before any process writes one
        if batches:
            share = batches[accelerator.process_index :: accelerator.num_processes]
            loaded = (load or load_model)(options, base_model, adapters, share, accelerator)
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


def _plan(requests: list[Any], options: argparse.Namespace, base_model: "BaseModel") -> list[Planned]:
    """The records of all images of each request.

    Raises:
        InputError: a folder contains images of other prompts, maps or settings.
    """
    from delora_diffusers.files.records import check_same_images, plan

    prediction = {
        flag: value
        for flag in ("prediction_type", "rescale_betas_zero_snr")
        if (value := getattr(base_model, flag)) is not None
    }
    planned = [(request, plan(request, options, base_model.name or MINIATURE, prediction)) for request in requests]
    for request, records in planned:
        check_same_images(request.output_dir, records)
    return planned


def _missing_batches(planned: list[Planned], size: int) -> list[Batch]:
    """The batches with at least one image that is still to generate, each at a single strength.

    They are the same wherever an earlier run stopped, because the last bits of an image depend on its batch.
    """
    from delora_diffusers.files.records import is_done

    batches = []
    for request, records in planned:
        for strength in request.strengths:
            at_strength = [record for record in records if record["strength"] == strength]
            for start in range(0, len(at_strength), size):
                batch = at_strength[start : start + size]
                missing = [record for record in batch if not is_done(request.output_dir, record)]
                if missing:
                    batches.append(Batch(request, batch, missing))
    return batches


def _check_palette(adapter: Path, batches: list[Batch]) -> None:
    """Check every map that will be used against the palette that the adapter was trained with.

    Raises:
        InputError: a map does not fit the palette.
    """
    from delora_diffusers.files.reading import read_header
    from delora_diffusers.maps import paint, read_map

    palette = read_header(adapter)["control_encoder"]["palette"]
    for source in dict.fromkeys(record["map_source"] for batch in batches for record in batch.records):
        paint(read_map(Path(source), source), palette, source)


def _write_results(planned: list[Planned], new: int) -> None:
    from delora_diffusers.files.records import write_contact_sheet, write_metadata

    for request, records in planned:
        write_metadata(request.output_dir, records)
        sheet = write_contact_sheet(request.output_dir, records)
    total = sum(len(records) for _, records in planned)
    folders = planned[0][0].output_dir if len(planned) == 1 else f"{len(planned)} folders"
    print(f"{total} {'image' if total == 1 else 'images'} in {folders} ({new} new); see {sheet}")


def load_model(
    options: argparse.Namespace, base_model: "BaseModel", adapters: list[Path], batches: list[Batch], accelerator: Any
) -> Loaded:
    """Load the base model for these batches.

    One part of it at a time is on the device: the text encoders until all prompts are encoded, then the denoiser, and
    beside it the autoencoder, which is small.
    """
    _check_placement(options, batches, accelerator.device)
    model = base_model.open()
    check_model(model, options, base_model, batches, accelerator)
    prompts = encode_prompts(model, options, adapters, batches, accelerator)
    return Loaded(model, load_denoiser(model, options, adapters, accelerator), prompts)


def check_model(
    model: "OpenModel", options: argparse.Namespace, base_model: "BaseModel", batches: list[Batch], accelerator: Any
) -> None:
    """Check an opened model against the flags, and give it the scheduler that was asked for.

    Raises:
        InputError: a size or the scheduler does not fit the model.
    """
    from delora_diffusers.pipelines.conditions import warn_of_truncation

    for flag in SIDES:
        check_patches(model.patch_pixels, getattr(options, flag) or 0, flag)
    _set_scheduler(model.pipeline, options, base_model)
    if accelerator.is_main_process:
        texts = [*(record["prompt"] for b in batches for record in b.records), options.negative_prompt]
        warn_of_truncation(model.pipeline, list(dict.fromkeys(texts)), options.max_prompt_chunks)


def encode_prompts(
    model: "OpenModel", options: argparse.Namespace, adapters: list[Path], batches: list[Batch], accelerator: Any
) -> "EncodedPrompts":
    """The prompts of all batches, encoded."""
    from delora_diffusers.memory import explain_out_of_memory
    from delora_diffusers.pipelines.encoded_prompts import EncodedPrompts
    from delora_diffusers.precision import dtype_of

    with explain_out_of_memory("loading the base model", _smaller(accelerator)):
        used = [(record["prompt"], _scaled(batch)) for batch in batches for record in batch.records]
        device, dtype = accelerator.device, dtype_of(accelerator.mixed_precision)
        return EncodedPrompts(model, adapters, used, options.negative_prompt, device, dtype, options.max_prompt_chunks)


def load_denoiser(
    model: "OpenModel", options: argparse.Namespace, adapters: list[Path], accelerator: Any
) -> "AdaptedModel":
    """Load the denoiser and the autoencoder."""
    from delora_diffusers.memory import explain_out_of_memory
    from delora_diffusers.pipelines.adapted_pipeline import AdaptedModel
    from delora_diffusers.precision import denoiser_dtype, dtype_of

    device = accelerator.device
    with explain_out_of_memory("loading the base model", _smaller(accelerator)):
        name = model.family.DENOISER
        weights_dtype = denoiser_dtype(options.base_precision, accelerator.mixed_precision)
        quantization = quantization_config(options.base_precision, weights_dtype, model.family.UNQUANTIZED)
        denoiser = model.load(name, weights_dtype, "cpu" if options.offload else device, quantization)
        adapted = AdaptedModel(denoiser, name, adapters)
        model.load("vae", dtype_of(accelerator.mixed_precision), device)
    return adapted


def _smaller(accelerator: Any) -> list[str]:
    """What makes the base model need less memory."""
    smaller = ["--base_precision nf4", "--offload"]
    return ["--mixed_precision bf16 or fp16", *smaller] if accelerator.mixed_precision == "no" else smaller


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
    smaller = _smaller(accelerator)
    savings = ["--batch_size 1", *smaller, "a smaller --resolution"]
    side = options.resolution or default_resolution(pipeline, denoiser)
    width, height = options.width or side, options.height or side
    batches = [part for batch in batches for part in _of_equal_length(batch, prompts)]
    in_use: list[tuple[Path, float]] | None = None
    for batch in tqdm(batches, desc="generating", disable=not accelerator.is_local_main_process):
        request, records, missing = batch
        adapters_of_batch = _scaled(batch)
        if adapters_of_batch != in_use:
            in_use = adapters_of_batch
            with explain_out_of_memory("loading the adapter", smaller):
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


def _of_equal_length(batch: Batch, prompts: "EncodedPrompts") -> list[Batch]:
    """A batch by the number of chunks of its prompts, so that an image does not depend on the other prompts."""
    parts: dict[int, Records] = {}
    for record in batch.records:
        parts.setdefault(prompts.chunks_of(record["prompt"]), []).append(record)
    of_parts = [Batch(batch.request, part, [r for r in part if r in batch.missing]) for part in parts.values()]
    return [part for part in of_parts if part.missing]


def _check_placement(options: argparse.Namespace, batches: list[Batch], device: Any) -> None:
    """Reject a base precision or offloading that does not work on this device or with these adapters.

    Raises:
        InputError
    """
    check_base_precision(options, device.type)
    if options.offload and options.base_precision in PACKAGES:
        raise InputError(f"--offload and --base_precision {options.base_precision} exclude each other; give only one.")
    from delora_diffusers.files.reading import adapter_path, parse_config, read_header
    from delora_diffusers.methods.table import METHODS

    for batch in batches if options.base_precision in PACKAGES else ():
        if len(batch.request.adapters) > 1:
            raise InputError(
                f"several adapters cannot be mixed on a model in {options.base_precision}; leave out --base_precision."
            )
        for path, _ in batch.request.adapters:
            configs = read_header(path)["config"]
            config = configs.get("unet", configs.get("transformer"))
            if config is not None and not METHODS[parse_config(adapter_path(path), config).method].has_factors:
                raise InputError(
                    f"{path} is not low-rank, so it cannot be used with --base_precision {options.base_precision}; "
                    "leave that out."
                )
    if options.offload and len({tuple(_scaled(batch)) for batch in batches}) > 1:
        raise InputError("--offload works with one set of adapters at one strength; run generate once for each.")


def _scaled(batch: Batch) -> list[tuple[Path, float]]:
    """The adapters of a batch with their weights times its strength."""
    return [(path, weight * batch.records[0]["strength"]) for path, weight in batch.request.adapters]


def _set_scheduler(pipeline: Any, options: argparse.Namespace, base_model: "BaseModel") -> None:
    """Use the scheduler that was asked for.

    Raises:
        InputError: it does not fit the base model or the number of steps.
    """
    import diffusers

    from delora_diffusers.pipelines.conditions import family_in
    from delora_diffusers.pipelines.noise_schedule import check_ddpm, check_flow, check_samples_from_noise, check_steps

    if family_in(pipeline).IS_FLOW:
        check_flow(pipeline.scheduler, base_model.name)
        return check_steps(pipeline.scheduler, options.num_inference_steps, "num_inference_steps")
    if options.scheduler is not None:
        check_ddpm(pipeline.scheduler, base_model.name)
        kind = getattr(diffusers, SCHEDULERS[options.scheduler])
        check_samples_from_noise(kind, pipeline.scheduler, f"--scheduler {options.scheduler}")
        try:
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        except ImportError as error:
            raise InputError(
                f"--scheduler {options.scheduler} needs a package that is missing: {reason(error)}"
            ) from error
    try:
        pipeline.scheduler.set_timesteps(options.num_inference_steps)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"--num_inference_steps {options.num_inference_steps} does not work ({reason(error)})."
        ) from error
