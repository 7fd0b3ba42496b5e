"""Flags of both training scripts, with diffusers' names where it has them."""

import argparse
from pathlib import Path
from typing import Any

from delora_diffusers.families.checks import PROMPT_CHUNKS_HELP
from delora_diffusers.families.flags import add_single_file_arguments
from delora_diffusers.families.quantization import add_base_precision_argument
from delora_diffusers.methods.config import (
    PATHS,
    RELATIVE_BOUND,
    SPLIT_DTYPES,
    STARTS,
    UNET_TARGETS,
    WEIGHT_NORMS,
    AdapterConfig,
)
from delora_diffusers.methods.table import LAMBDA_LEARNING_RATE, METHODS
from delora_diffusers.names import MINIATURE
from delora_diffusers.training.defaults import DENSITIES
from delora_diffusers.training.optimizer_flags import add_optimizer_arguments

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)

WEIGHTING_SCHEMES = (*DENSITIES, "sigma_sqrt", "cosmap")
"""How times are sampled, and how flows weight the loss by them; diffusers' names."""

LOSS_TYPES = ("l2", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
"""Losses and their schedules; diffusers' and kohya's names."""


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def timestep_shift(text: str) -> float | str:
    """``resolution`` or a number."""
    try:
        return text if text == "resolution" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor resolution") from None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=MINIATURE,
        help="a pipeline folder, a hub id or a .safetensors file: Stable Diffusion 1.x to 3.5, XL, Flux.1, FLUX.2, "
        f"Z-Image or Qwen-Image; default: {MINIATURE}, which is included",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--variant", help="file variant, for example fp16")
    add_single_file_arguments(group)
    add_base_precision_argument(group)


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = AdapterConfig()
    group = parser.add_argument_group("adapter")
    group.add_argument(
        "--init_adapter",
        type=Path,
        help="start from this adapter: an output folder, checkpoint, file or hub id, or another tool's LoRA; settings "
        "that are not given are taken from it: docs/training.md",
    )
    group.add_argument("--method", choices=list(METHODS), default=defaults.method, help="default: delora")
    group.add_argument("--rank", type=positive_int, default=defaults.rank, help=f"default: {defaults.rank}")
    group.add_argument("--delora_lambda", type=float, help="initial boundary, the same for every matrix")
    group.add_argument(
        "--relative_bound",
        type=float,
        help=f"initial boundary relative to the norm of each matrix; default: {RELATIVE_BOUND:g}",
    )
    group.add_argument(
        "--start",
        choices=STARTS,
        default=defaults.start,
        help="how the update starts at 0: subtract a frozen copy of the random start (default), or B = 0",
    )
    group.add_argument(
        "--weight_norm", choices=WEIGHT_NORMS, default=defaults.weight_norm, help="scale of the update; default: column"
    )
    group.add_argument("--alpha", type=float, help="alpha of LoRA and DoRA; default: 2 * rank")
    group.add_argument(
        "--blocks", type=positive_int, help="diagonal blocks; default: 1 for ETHER and ETHER+, 4 for OFT"
    )
    group.add_argument(
        "--coft_eps", type=float, help="constrain OFT's rotations (COFT), in OFT's scripts by 6e-5; default: off"
    )
    group.add_argument(
        "--targets",
        nargs="+",
        help="suffixes of the names of the denoiser's modules to adapt; default: attention's projections, for maps "
        "also ff.net.0.proj, everything for DreamBooth with --method full",
    )
    group.add_argument(
        "--path",
        choices=PATHS,
        default=defaults.path,
        help="how adapted layers are computed; default: auto, which depends on the model: docs/performance.md",
    )
    group.add_argument(
        "--split_dtype",
        choices=SPLIT_DTYPES,
        help="dtype of the update's product on the split path; default: float32, or the model's if it is quantized",
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("runs/delora"), help="default: runs/delora")
    group.add_argument("--seed", type=int, default=0, help="default: 0")
    group.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        default=[512],
        help="side in pixels of a square of the area to train at; with several, each photo is trained at each; "
        "default: 512",
    )
    group.add_argument(
        "--square", action="store_true", help="crop photos square instead of training at a size near their shape"
    )
    group.add_argument(
        "--bucket_step", type=positive_int, default=64, help="sizes have sides in multiples of this; default: 64"
    )
    group.add_argument("--max_prompt_chunks", type=positive_int, default=1, help=PROMPT_CHUNKS_HELP)
    group.add_argument("--train_batch_size", type=positive_int, default=1, help="batch size per process")
    group.add_argument("--max_train_steps", type=positive_int, default=1200, help="optimizer steps")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1, help="batches per optimizer step")
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="recompute activations in the backward to save memory"
    )
    group.add_argument(
        "--offload",
        action="store_true",
        help="keep the blocks of the denoiser in host memory and bring them to the GPU in turn; slower; turns on "
        "--gradient_checkpointing",
    )
    group.add_argument(
        "--learning_rate",
        type=float,
        help="learning rate of A and B; default: depends on --method and --optimizer, with AdamW 2e-2 for DeLoRA "
        "(1e-2 on the miniature) and 6e-4 for LoRA",
    )
    group.add_argument(
        "--lambda_learning_rate",
        type=float,
        default=LAMBDA_LEARNING_RATE,
        help="learning rate of lambda; default: 1e-3",
    )
    group.add_argument("--lr_scheduler", choices=SCHEDULERS, default="constant", help="default: constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0, help="default: 0")
    group.add_argument("--lr_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts")
    group.add_argument("--lr_power", type=float, default=1.0, help="power of the polynomial schedule")
    group.add_argument("--lr_step_rules", help="rules of piecewise_constant, for example 1:500,0.1")
    add_optimizer_arguments(group)
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="maximum gradient norm; 0 turns clipping off")
    group.add_argument("--snr_gamma", type=float, help="weight the loss by min-SNR with this gamma, commonly 5.0")
    group.add_argument(
        "--debiased_estimation_loss", action="store_true", help="weight the loss by 1 / sqrt(SNR) instead"
    )
    group.add_argument("--loss_type", choices=LOSS_TYPES, default="l2", help="default: l2, the squared error")
    group.add_argument("--huber_c", type=float, help="threshold of huber and smooth_l1; default: 0.1")
    group.add_argument(
        "--huber_schedule",
        choices=HUBER_SCHEDULES,
        help="how that threshold falls from 1 with the noise; default: snr, for flow models exponential",
    )
    group.add_argument(
        "--weighting_scheme",
        choices=WEIGHTING_SCHEMES,
        help="how times are sampled, and of flow models how the loss is weighted; default: logit_normal for Stable "
        "Diffusion 3, none (uniform) for the others",
    )
    group.add_argument("--logit_mean", type=float, help="of logit_normal; positive means less noise; default: 0")
    group.add_argument("--logit_std", type=float, help="of logit_normal; default: 1")
    group.add_argument("--mode_scale", type=float, help="of mode; default: 1.29")
    group.add_argument(
        "--timestep_shift",
        type=timestep_shift,
        help="of flow models: shift times towards the noise by this factor, or 'resolution' for one that grows with "
        "the image's size; default: the scheduler's, if it is fixed, else 1",
    )
    group.add_argument("--noise_offset", type=float, default=0.0, help="default: 0")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's setting")
    group.add_argument("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and later")
    group.add_argument(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        help="record a training step once and replay it; default: on a GPU, if the method allows it",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="bit-identical results across runs on the same GPU model"
    )
    group = parser.add_argument_group("checkpoints, validation and logs")
    group.add_argument("--checkpointing_steps", type=positive_int, default=500, help="save a checkpoint every N steps")
    group.add_argument("--checkpoints_total_limit", type=positive_int, help="keep only the newest N checkpoints")
    group.add_argument(
        "--keep_checkpoint_adapters", action="store_true", help="keep the adapter file of checkpoints beyond that limit"
    )
    group.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    group.add_argument(
        "--validation_steps", type=positive_int, default=200, help="generate validation images every N steps"
    )
    group.add_argument("--num_validation_images", type=positive_int, default=4, help="per prompt; default: 4")
    group.add_argument(
        "--validation_inference_steps", type=positive_int, default=30, help="denoising steps per image; default: 30"
    )
    group.add_argument(
        "--guidance_scale", type=float, help="guidance scale of validation images; default: the pipeline's usual one"
    )
    group.add_argument("--logging_steps", type=positive_int, default=10, help="log every N steps")
    group.add_argument(
        "--report_to",
        default="tensorboard",
        choices=("tensorboard", "wandb", "all", "none"),
        help="default: tensorboard",
    )
    group.add_argument("--push_to_hub", action="store_true", help="upload the finished run")
    group.add_argument("--hub_model_id", help="default: the name of the output folder")
    group.add_argument("--hub_token", help="default: the token of your hub login")
    group.add_argument("--config", type=Path, help="YAML file with these flags as keys; flags given here override it")


def adapter_config(args: argparse.Namespace, **changes: Any) -> AdapterConfig:
    """The ``AdapterConfig`` that the flags describe."""
    values = dict(
        method=args.method,
        rank=args.rank,
        delora_lambda=args.delora_lambda,
        relative_bound=args.relative_bound,
        start=args.start,
        weight_norm=args.weight_norm,
        alpha=args.alpha,
        blocks=args.blocks,
        coft_eps=args.coft_eps,
        targets=tuple(args.targets or UNET_TARGETS),
        path=args.path,
        split_dtype=args.split_dtype,
    )
    return AdapterConfig(**(values | changes))
