"""What both training scripts do before and after training."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.checkpoint import checkpoint

from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_patches
from delora_diffusers.families.loading import OpenModel, open_model
from delora_diffusers.families.quantization import check_base_precision, quantization_config
from delora_diffusers.launching import launched_accelerator
from delora_diffusers.memory import explain_out_of_memory
from delora_diffusers.names import SD_PIPELINE
from delora_diffusers.pipelines.conditions import joined, read_prompts
from delora_diffusers.pipelines.encoded_prompts import load_text_encoder
from delora_diffusers.pipelines.noise_schedule import check_steps
from delora_diffusers.precision import denoiser_dtype, dtype_of
from delora_diffusers.training import checkpoints, run_folder
from delora_diffusers.training.adapter_files import AdapterFiles
from delora_diffusers.training.noising import Noising, noising_of


def start_accelerator(args: argparse.Namespace, data: dict[str, str]) -> Accelerator:
    """Create the accelerator for these flags.

    Args:
        data: a digest of each file that is trained on; see ``run_folder.data_digests``.

    Raises:
        InputError: the run to resume has other settings or data, or its checkpoint does not exist or is damaged, or
            accelerate is configured for something that is not supported.
    """
    if args.resume_from_checkpoint is not None:
        checkpoints.keep_earlier_defaults(args)
        checkpoints.check_same_run(args.output_dir, args.resume_from_checkpoint, run_folder.settings(args), data)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it on start-up
        torch.use_deterministic_algorithms(True, warn_only=True)
    accelerator = launched_accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(args.output_dir, args.output_dir / "logs"),
    )
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def training_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen models."""
    return dtype_of(accelerator.mixed_precision)


def open_base_model(accelerator: Accelerator, args: argparse.Namespace) -> tuple[OpenModel, Noising]:
    """Open the base model, of which no weights are loaded yet, and its noising.

    Raises:
        InputError: it is not a model that can be trained.
    """
    check_base_precision(args, accelerator.device.type)
    with accelerator.main_process_first():
        model = open_model(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            model_config=args.model_config,
            prediction_type=args.prediction_type,
            rescale_betas_zero_snr=args.rescale_betas_zero_snr,
        )
    noising = noising_of(model, args)
    _check_trainable(model)
    for resolution in args.resolutions:
        check_patches(model.patch_pixels, resolution)
    check_steps(model.pipeline.scheduler, args.validation_inference_steps, "validation_inference_steps")
    return model, noising


def load_part(model: OpenModel, component: str, accelerator: Accelerator, dtype: torch.dtype | None = None) -> Any:
    """Load a text encoder or the autoencoder onto the device, in the training precision unless a dtype is given."""
    with explain_out_of_memory(f"loading the base model's {component}", SMALLER):
        return model.load(component, dtype or training_dtype(accelerator), accelerator.device)


def encode_with(
    model: OpenModel, name: str, accelerator: Accelerator, prompts: Sequence[str], chunks: int = 1
) -> dict[str, torch.Tensor]:
    """The outputs of a text encoder for prompts, on the device; see ``read_prompts``. It is loaded for that only."""
    savings = ["--mixed_precision bf16 or fp16", "shorter prompts", "a smaller base model"]
    with explain_out_of_memory(f"encoding prompts with the base model's {name}", savings), torch.no_grad():
        load_text_encoder(model, name, training_dtype(accelerator), accelerator.device)
        # CLIP's prompts are short. Those of language models need memory for hundreds of tokens each.
        together = [list(prompts)] if name in model.family.TRAINABLE_ENCODERS else [[prompt] for prompt in prompts]
        outputs = joined([read_prompts(model.pipeline, name, batch, accelerator.device, chunks) for batch in together])
    model.drop(name)
    return outputs


def load_denoiser(model: OpenModel, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Load the denoiser in the training precision or the one asked for.

    It is on the device, or on the CPU with ``--offload``: ``offload_blocks`` moves it when it has its adapter.
    """
    device = "cpu" if args.offload else accelerator.device
    dtype = denoiser_dtype(args.base_precision, accelerator.mixed_precision)
    name = model.family.DENOISER
    quantization = quantization_config(args.base_precision, dtype, model.family.UNQUANTIZED)
    with explain_out_of_memory(f"loading the base model's {name}", SMALLER):
        return model.load(name, dtype, device, quantization)


def load_denoiser_to_train(model: OpenModel, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Load the denoiser as ``load_denoiser`` does, with gradient checkpointing if it is asked for."""
    denoiser = load_denoiser(model, accelerator, args)
    model.family.prepare_to_train(denoiser)
    if args.gradient_checkpointing:
        checkpoint_denoiser(denoiser)
    return denoiser


def load_text_encoder_to_train(model: OpenModel, name: str, accelerator: Accelerator, args: argparse.Namespace) -> Any:
    """Load a text encoder onto the device, with gradient checkpointing if it is asked for."""
    encoder = load_part(model, name, accelerator)
    if args.gradient_checkpointing:
        checkpoint_text_encoder(encoder)
    return encoder


def checkpoint_denoiser(denoiser: Any) -> None:
    """Turn on gradient checkpointing, which needs the training mode."""
    denoiser.enable_gradient_checkpointing(run_checkpointed)
    denoiser.train()


def checkpoint_text_encoder(encoder: Any) -> None:
    """Turn on gradient checkpointing, which needs the training mode."""
    encoder.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    encoder.train()


SMALLER = ["--mixed_precision bf16 or fp16", "--base_precision nf4", "--offload", "a smaller base model"]
"""What helps if a part of the base model does not fit."""


def _check_trainable(model: OpenModel) -> None:
    """Reject a base model that can be sampled but not trained as it was.

    Raises:
        InputError
    """
    problem, family, autoencoder = None, model.family, type(model.skeletons["vae"]).__name__
    if autoencoder != family.AUTOENCODER:
        problem = f"has a {autoencoder} and not an {family.AUTOENCODER}"
    if getattr(model.skeletons[family.DENOISER].config, "time_cond_proj_dim", None) is not None:
        problem = "was distilled to take the guidance scale as an input"
    if any(getattr(model.skeletons[name].config, "use_attention_mask", None) for name in model.text_encoders):
        problem = "has a text encoder that masks the padding of prompts"
    if problem is not None:
        raise InputError(f"the base model {model.name} {problem}; choose another to train on.")


def check_prompt_lengths(model: OpenModel, prompts: Sequence[str]) -> None:
    """Reject prompts of different lengths, for ``--cuda_graph``, if the denoiser computes each at its own.

    Raises:
        InputError
    """
    tokenizer, _ = model.family.prompt_limit(model.pipeline)
    if not model.family.PADS_PROMPTS and len({len(tokenizer(prompt).input_ids) for prompt in prompts}) > 1:
        raise InputError(f"--cuda_graph needs batches of the same shape, but {RAGGED}; leave it out.")


RAGGED = "this model computes prompts at their own length, and they have different lengths"


def run_checkpointed(module: torch.nn.Module, *inputs: Any) -> Any:
    """Run a module and recompute its activations in the backward; it uses no random numbers, so no state is saved."""
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def begin_run(accelerator: Accelerator, args: argparse.Namespace, data: dict[str, str], name: str) -> None:
    """Write the run's settings, start the trackers and set the global seed. Nothing is written before this.

    Raises:
        InputError: a CUDA graph is asked for without a CUDA GPU.
    """
    if args.cuda_graph and accelerator.device.type != "cuda":
        raise InputError(f"--cuda_graph needs a CUDA GPU, and this run is on {accelerator.device.type}; leave it out.")
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run_folder.write_config(args.output_dir, args, data)
    accelerator.wait_for_everyone()
    if args.report_to != "none":
        kinds = (int, float, str, bool)
        flat = {k: v if isinstance(v, kinds) else str(v) for k, v in run_folder.settings(args).items()}
        accelerator.init_trackers(name, config=flat)
    set_seed(args.seed)


def save_run(
    accelerator: Accelerator, files: AdapterFiles, subject: int, trained_on: str, data: dict[str, str]
) -> None:
    """Save a subject's adapter, its configuration and model card, and upload them with ``--push_to_hub``.

    Args:
        trained_on: the data, for the model card, for example ``5 photos``. data: as for ``start_accelerator``.
    """
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    args = files.subjects[subject]
    if not files.is_finite(subject):
        raise InputError(
            f"the last step made {args.output_dir}'s adapter not finite; lower --learning_rate, or resume from an "
            "earlier checkpoint."
        )
    adapter = files.denoiser
    reached = {"distance": adapter.all_distances()[subject].mean().item()}
    lambdas = adapter.all_lambdas()
    if lambdas is not None:
        reached["lambda"] = lambdas[subject].mean().item()
    run_folder.write_config(args.output_dir, args, data, reached)
    run_folder.write_model_card(
        args.output_dir,
        args,
        trained_on,
        files.prompts[subject],
        follows_maps="control" in files.parts,
        components=list(files.adapters),
        pipeline=files.parts.get("pipeline") or SD_PIPELINE,
    )
    # The adapter is written last: its file marks the run as finished.
    file = files.write(subject, args.output_dir)
    print(f"saved {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    if args.push_to_hub:
        print(f"pushed to {run_folder.push_to_hub(args.output_dir, args)}")
