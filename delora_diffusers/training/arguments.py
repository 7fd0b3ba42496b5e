"""Flags of both training scripts, with diffusers' names where it has them, and ``--config FILE.yaml``."""

import argparse
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delora_diffusers.dispatch import Parser
from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import PROMPT_CHUNKS_HELP, check_side
from delora_diffusers.families.flags import add_single_file_arguments
from delora_diffusers.families.quantization import PACKAGES, add_base_precision_argument, check_base_precision
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
from delora_diffusers.names import MINIATURE, is_miniature
from delora_diffusers.outputs import check_run_folder, is_first_process
from delora_diffusers.text_files import as_bool, is_text, read_yaml
from delora_diffusers.training.defaults import DENSITIES, MINIATURE_DEFAULTS
from delora_diffusers.training.optimizer_flags import add_optimizer_arguments, check_optimizer
from delora_diffusers.training.run_folder import check_hub_login

if TYPE_CHECKING:
    pass

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

OF_METHODS = {
    "alpha": ("lora", "dora", "dora_fixed_magnitude"),
    "blocks": ("ether", "etherplus", "etherplus_onesided", "oft"),
}
"""Flags that other methods would ignore."""

STEP_RULES = r"(\d*\.?\d+:\d+,)*\d*\.?\d+"
"""FACTOR:STEP pairs, each multiplying the learning rate up to that step, then the final factor."""


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


def parse_with_config(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, miniature: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse the values of ``--config`` as if they were given as flags, then the flags, which override them.

    Args:
        miniature: further defaults for the included base model; they override ``MINIATURE_DEFAULTS``.

    Raises:
        InputError: the file is missing, is not a mapping, or has a key that is not a flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    broken = next((word for word in argv if not is_text(word)), None)
    if broken is not None:
        raise InputError(f"the argument {broken!r} is not UTF-8; set the terminal's encoding, or use --config.")
    file = parser.parse_known_args(argv)[0].config
    argv = ([] if file is None else _read_config(parser, file)) + argv
    parsed = parser.parse_known_args(argv)[0]
    if is_miniature(parsed.pretrained_model_name_or_path):
        parser.set_defaults(**(MINIATURE_DEFAULTS | (miniature or {})))
    args = parser.parse_args(argv)
    if args.init_adapter is None:
        return args
    from delora_diffusers.training.init_adapter import with_settings_of_adapter  # imports torch

    return with_settings_of_adapter(args, _given(parser, argv))


def _given(parser: argparse.ArgumentParser, argv: list[str]) -> set[str]:
    """The names of the flags that were given, also with the value that is their default."""
    unset = object()
    args = parser.parse_args(argv, argparse.Namespace(**{action.dest: unset for action in parser._actions}))
    return {name for name, value in vars(args).items() if value is not unset}


def _read_config(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The contents of a YAML file as command line arguments."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give --config a YAML file.")
    values = read_yaml(file)
    if values is None:
        return []
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a mapping of flags to values; write lines like `rank: 16`.")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    argv: list[str] = []
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            what = "cannot be set in a file" if key in ("config", "help") else "is not a flag"
            raise InputError(f"{file} sets {key!r}, which {what}; see --help for the flags.")
        argv += _as_arguments(file, actions[key], value)
    if isinstance(parser, Parser):
        parser.source = str(file)
        parser.parse_known_args(argv)  # so that an error names the file
        parser.source = None
    return argv


def _as_arguments(file: Path, action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.nargs == 0:
        switch = as_bool(value)
        if switch is None:
            raise InputError(f"{file} sets {action.dest} to {value!r}; write true or false.")
        if isinstance(action, argparse.BooleanOptionalAction):
            return [action.option_strings[not switch]]
        return [flag] if switch else []
    several = action.nargs == "+"
    items = value if isinstance(value, list) and several else [value]
    for item in items:
        if item is None or isinstance(item, list | dict):
            raise InputError(f"{file} sets {action.dest} to {value!r}; give {'values' if several else 'one value'}.")
    if not several:
        return [f"{flag}={value}"]
    dashed = next((item for item in items if str(item).startswith("-") and not _is_number(str(item))), None)
    if dashed is not None:
        raise InputError(f"{file} sets {action.dest} to {dashed!r}, which would be read as a flag; start it otherwise.")
    return [flag, *map(str, items)] if items else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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


RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, 1e38),
    "lambda_learning_rate": (0, 1e38),
    "adam_beta1": (0, 0.999999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, 1),
    "adam_weight_decay": (0, 1e4),
    "max_grad_norm": (0, 1e12),
    "ema_decay": (0, 0.9999999),
    "snr_gamma": (1e-6, 1e6),
    "huber_c": (1e-6, 1e6),
    "noise_offset": (-10, 10),
    "logit_mean": (-20, 20),
    "logit_std": (0, 20),
    "mode_scale": (-1, 2 / (math.pi - 2)),
    "prior_loss_weight": (0, 1e6),
    "output_preservation_weight": (0, 1e6),
    "mask_background_weight": (0, 1),
    "caption_dropout": (0, 1),
    "validation_split": (0, 0.9),
    "lr_warmup_steps": (0, 1e9),
    "lr_power": (0, 1e3),
    "guidance_scale": (-1e3, 1e3),
    "validation_inference_steps": (1, 1000),
}
"""The smallest and the largest value of flags with which a run can end well."""


def _check_numbers(args: argparse.Namespace) -> None:
    for name, (smallest, largest) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not smallest <= value <= largest:
            raise InputError(f"--{name} {value} is not between {smallest:g} and {largest:g}; choose another value.")
    if not isinstance(args.timestep_shift, str | None) and not 1e-3 <= args.timestep_shift <= 1e3:
        raise InputError(f"--timestep_shift {args.timestep_shift} is not between 0.001 and 1000; choose another value.")


def _check_memory_flags(args: argparse.Namespace) -> None:
    """Reject a base precision or offloading that cannot be used with the other flags."""
    check_base_precision(args)
    title = METHODS[args.method].title
    if args.base_precision in PACKAGES and not METHODS[args.method].has_factors:
        raise InputError(
            f"--base_precision {args.base_precision} quantizes the model, which {title} cannot adapt; use --method "
            "delora or lora, or --base_precision bf16."
        )
    if args.base_precision in PACKAGES and args.path == "fast":
        raise InputError(f"--base_precision {args.base_precision} needs --path split or lean; leave out --path.")
    if not args.offload:
        return
    if not METHODS[args.method].has_factors:
        raise InputError(f"--offload needs a low-rank method, which {title} is not; use --method delora or lora.")
    for flag, given, remedy in (
        ("--cuda_graph", args.cuda_graph, "leave out one of them"),
        ("--path fast", args.path == "fast", "leave out --path"),
        (f"--base_precision {args.base_precision}", args.base_precision in PACKAGES, "leave out one of them"),
    ):
        if given:
            raise InputError(f"--offload moves weights while training, which {flag} does not allow; {remedy}.")


def check_training_arguments(args: argparse.Namespace) -> None:
    """Reject bad values before anything is loaded.

    Raises:
        InputError: a value is invalid, the output folder contains another run, or the disk is full.
    """
    for flag, sides in (("resolution", args.resolutions), ("bucket_step", [args.bucket_step])):
        for side in sides:
            check_side(flag, side)
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed} is not between 0 and {2**32 - 1}; choose another.")
    _check_numbers(args)
    _check_schedule(args)
    adapter_config(args)
    for flag, methods in OF_METHODS.items():
        if getattr(args, flag) is not None and args.method not in methods and args.init_adapter is None:
            raise InputError(f"--{flag} belongs to --method {', '.join(methods)}, not {args.method}; leave it out.")
    for flag in ("delora_lambda", "relative_bound"):
        if args.init_adapter is not None and getattr(args, flag) is not None:
            raise InputError(f"--{flag} is that of a new adapter, but --init_adapter has its own; leave out one.")
    _check_memory_flags(args)
    check_optimizer(args)
    _check_loss(args)
    if args.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--report_to wandb needs wandb, which is not installed; run `pip install wandb`.")
    check_run_folder(args.output_dir, args.resume_from_checkpoint)
    if args.optimizer != "adamw" or args.optimizer_args:
        # Last, because the packages of optimizers import torch.
        from delora_diffusers.training.optimizers import check_options

        check_options(args)
    if args.push_to_hub and is_first_process():
        check_hub_login(args)


def _check_schedule(args: argparse.Namespace) -> None:
    """Reject flags of schedules other than the one that is used, which would change nothing."""
    if args.lr_scheduler == "piecewise_constant" and not re.fullmatch(STEP_RULES, args.lr_step_rules or ""):
        given = "" if args.lr_step_rules is None else f", not {args.lr_step_rules}"
        raise InputError(f"--lr_scheduler piecewise_constant needs --lr_step_rules such as 1:500,0.1{given}.")
    for flag, unused, schedule in (
        ("lr_step_rules", None, "piecewise_constant"),
        ("lr_num_cycles", 1, "cosine_with_restarts"),
        ("lr_power", 1.0, "polynomial"),
    ):
        if getattr(args, flag) != unused and args.lr_scheduler != schedule:
            raise InputError(f"--{flag} belongs to --lr_scheduler {schedule}, which is not used; leave it out.")
    has_warmup = args.optimizer.endswith("schedulefree") or args.lr_scheduler not in ("constant", "piecewise_constant")
    if args.lr_warmup_steps and not has_warmup:
        remedy = "give constant_with_warmup" if args.lr_scheduler == "constant" else "leave it out"
        raise InputError(f"--lr_warmup_steps does nothing with --lr_scheduler {args.lr_scheduler}; {remedy}.")


def _check_loss(args: argparse.Namespace) -> None:
    """Reject flags of the loss that exclude each other."""
    for flag in ("huber_c", "huber_schedule"):
        if args.loss_type == "l2" and getattr(args, flag) is not None:
            raise InputError(
                f"--{flag} belongs to --loss_type huber and smooth_l1; leave it out, or give one of these."
            )
    if args.debiased_estimation_loss and args.snr_gamma is not None:
        raise InputError("--debiased_estimation_loss and --snr_gamma both weight the loss by the SNR; choose one.")
