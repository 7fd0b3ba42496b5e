"""The base model that ``generate`` samples from, loaded one part at a time and checked against the flags."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delora_diffusers.commands.generate_requests import Batch, scaled
from delora_diffusers.errors import InputError, reason
from delora_diffusers.families.checks import check_patches
from delora_diffusers.families.quantization import PACKAGES, check_base_precision, quantization_config

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


class Loaded(NamedTuple):
    """A base model that is ready to sample from: its denoiser and autoencoder are on the device.

    Attributes:
        adapted: the denoiser with the adapters of all batches. prompts: those of all batches.
    """

    model: "OpenModel"
    adapted: "AdaptedModel"
    prompts: "EncodedPrompts"


def load_model(
    options: argparse.Namespace, base_model: "BaseModel", adapters: list[Path], batches: list[Batch], accelerator: Any
) -> Loaded:
    """Load the base model for these batches.

    One part of it at a time is on the device: the text encoders until all prompts are encoded, then the denoiser, and
    beside it the autoencoder, which is small.
    """
    check_placement(options, batches, accelerator.device)
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
    set_scheduler(model.pipeline, options, base_model)
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

    with explain_out_of_memory("loading the base model", smaller(accelerator)):
        used = [(record["prompt"], scaled(batch)) for batch in batches for record in batch.records]
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
    with explain_out_of_memory("loading the base model", smaller(accelerator)):
        name = model.family.DENOISER
        weights_dtype = denoiser_dtype(options.base_precision, accelerator.mixed_precision)
        quantization = quantization_config(options.base_precision, weights_dtype, model.family.UNQUANTIZED)
        denoiser = model.load(name, weights_dtype, "cpu" if options.offload else device, quantization)
        adapted = AdaptedModel(denoiser, name, adapters)
        model.load("vae", dtype_of(accelerator.mixed_precision), device)
    return adapted


def smaller(accelerator: Any) -> list[str]:
    """What makes the base model need less memory."""
    flags = ["--base_precision nf4", "--offload"]
    return ["--mixed_precision bf16 or fp16", *flags] if accelerator.mixed_precision == "no" else flags


def check_placement(options: argparse.Namespace, batches: list[Batch], device: Any) -> None:
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
    if options.offload and len({tuple(scaled(batch)) for batch in batches}) > 1:
        raise InputError("--offload works with one set of adapters at one strength; run generate once for each.")


def set_scheduler(pipeline: Any, options: argparse.Namespace, base_model: "BaseModel") -> None:
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
