"""The flags that every training script has, named as diffusers names them, and ``--config FILE.yaml``."""

import argparse
import importlib.util
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from delora_diffusers.errors import InputError
from delora_diffusers.methods.config import EVERYTHING, PATHS, STARTS, UNET_TARGETS, WEIGHT_NORMS, AdapterConfig
from delora_diffusers.methods.table import LAMBDA_LEARNING_RATE, METHODS
from delora_diffusers.names import MINIATURE, is_miniature

MINIATURE_SUBJECT_RATES = {"delora": 1e-2}
"""On the shipped miniature DeLoRA has better prompt fidelity at half of the paper's rate; docs/miniature.md."""

SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "piecewise_constant",
)

STEP_RULES = r"(\d*\.?\d+:\d+,)*\d*\.?\d+"
"""Factors of the rate and the steps up to which they hold, then the last factor."""

MINIATURE_DEFAULTS: dict[str, Any] = {
    "resolution": 128,
    "train_batch_size": 4,
    "max_train_steps": 300,
    "validation_steps": 100,
    "guidance_scale": 4.0,
}
"""Where the shipped base model wants another default than Stable Diffusion 1.5; docs/miniature.md has the search."""

MIN_FREE_BYTES = 256 * 2**20


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("base model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default=MINIATURE,
        help=f"Stable Diffusion 1.x, 2.x or XL: a folder or a hub id; by default {MINIATURE}, which ships here",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--variant", help="file variant, for example fp16")


def add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = AdapterConfig()
    group = parser.add_argument_group("adapter")
    group.add_argument("--method", choices=list(METHODS), default=defaults.method)
    group.add_argument("--rank", type=positive_int, default=defaults.rank)
    group.add_argument("--delora_lambda", type=float, help="initial boundary; by default chosen by each matrix's width")
    group.add_argument("--start", choices=STARTS, default=defaults.start)
    group.add_argument("--weight_norm", choices=WEIGHT_NORMS, default=defaults.weight_norm)
    group.add_argument("--alpha", type=float, help="LoRA's and DoRA's alpha; by default 2 * rank")
    group.add_argument("--blocks", type=positive_int, help="diagonal blocks of ETHER, ETHER+ (1) and OFT (4)")
    group.add_argument(
        "--targets", nargs="+", help="endings of module names in the UNet; by default q, k, v, out; of full everything"
    )
    group.add_argument("--path", choices=PATHS, default=defaults.path, help="see docs/performance.md")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--output_dir", type=Path, default=Path("runs/delora"))
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--resolution", type=int, default=512)
    group.add_argument("--train_batch_size", type=positive_int, default=1)
    group.add_argument("--max_train_steps", type=positive_int, default=1200)
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--learning_rate", type=float, help="of A and B; by default 2e-2 (DeLoRA), 6e-4 (LoRA)")
    group.add_argument("--lambda_learning_rate", type=float, default=LAMBDA_LEARNING_RATE)
    group.add_argument("--lr_scheduler", choices=SCHEDULERS, default="constant")
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--lr_num_cycles", type=positive_int, default=1, help="cosine_with_restarts")
    group.add_argument("--lr_power", type=float, default=1.0, help="polynomial")
    group.add_argument("--lr_step_rules", help="piecewise_constant, for example 1:500,0.1")
    group.add_argument("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="of A and B; lambda has none")
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--snr_gamma", type=float, help="min-SNR weighting, 5.0 is usual")
    group.add_argument("--noise_offset", type=float, default=0.0)
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="by default accelerate's setting")
    group.add_argument("--allow_tf32", action="store_true")
    group.add_argument(
        "--cuda_graph",
        action=argparse.BooleanOptionalAction,
        help="record a step once and replay it; by default on one GPU, where it is possible",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits from every run on the same kind of GPU"
    )
    group = parser.add_argument_group("checkpoints, validation and logs")
    group.add_argument("--checkpointing_steps", type=positive_int, default=500)
    group.add_argument("--checkpoints_total_limit", type=positive_int)
    group.add_argument("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    group.add_argument("--validation_steps", type=positive_int, default=200)
    group.add_argument("--num_validation_images", type=positive_int, default=4)
    group.add_argument("--validation_inference_steps", type=positive_int, default=30)
    group.add_argument("--guidance_scale", type=float, default=7.5, help="of validation pictures")
    group.add_argument("--logging_steps", type=positive_int, default=10)
    group.add_argument("--report_to", default="tensorboard", choices=("tensorboard", "wandb", "all", "none"))
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id", help="by default the name of the output folder")
    group.add_argument("--hub_token")
    group.add_argument("--config", type=Path, help="YAML file whose keys are these flags; flags given here win")


def parse_with_config(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None, miniature: dict[str, Any] | None = None
) -> argparse.Namespace:
    """Parse flags over the values of ``--config``, which are checked as if they had been typed.

    Args:
        miniature: defaults where the base model is the shipped one, over ``MINIATURE_DEFAULTS``.

    Raises:
        InputError: the file is missing, is not a mapping, or has a key that is no flag.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    file = parser.parse_known_args(typed)[0].config
    typed = ([] if file is None else _read_config(parser, file)) + typed
    if is_miniature(parser.parse_known_args(typed)[0].pretrained_model_name_or_path):
        parser.set_defaults(**(MINIATURE_DEFAULTS | (miniature or {})))
    return parser.parse_args(typed)


def _read_config(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The flags of a YAML file as if they had been typed."""
    if not file.is_file():
        raise InputError(f"{file} is not a file; give --config a YAML file.")
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not valid YAML ({' '.join(str(error).split())}); mend it.") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a mapping of flags to values; write lines like `rank: 16`.")
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    typed: list[str] = []
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            raise InputError(f"{file} sets {key!r}, which is no flag; see --help for the names.")
        typed += _as_typed(actions[key], value)
    return typed


def _as_typed(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction):
        return [] if value is None else [action.option_strings[not value]]
    if action.nargs == 0:
        return [flag] if value else []
    if value is None:
        return []
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def adapter_config(args: argparse.Namespace, **changes: Any) -> AdapterConfig:
    """The ``AdapterConfig`` that the flags ask for."""
    values = dict(
        method=args.method,
        rank=args.rank,
        delora_lambda=args.delora_lambda,
        start=args.start,
        weight_norm=args.weight_norm,
        alpha=args.alpha,
        blocks=args.blocks,
        targets=tuple(args.targets),
        path=args.path,
    )
    return AdapterConfig(**(values | changes))


def with_defaults(args: argparse.Namespace, learning_rates: Mapping[str, float] | None = None) -> argparse.Namespace:
    """The arguments with the learning rate and targets that depend on the method, unless they were given.

    Args:
        learning_rates: by method, where they differ from the table of methods.
    """
    args = argparse.Namespace(**vars(args))
    if args.learning_rate is None:
        args.learning_rate = (learning_rates or {}).get(args.method, METHODS[args.method].learning_rate)
    if args.targets is None:
        args.targets = [EVERYTHING] if args.method == "full" else list(UNET_TARGETS)
    return args


def check_training_arguments(args: argparse.Namespace) -> None:
    """Reject what can be rejected before anything is loaded.

    Raises:
        InputError: a value that cannot work, an output folder that contains another run, a full disk.
    """
    if args.resolution % 8 or args.resolution < 8:
        nearest = max(8, round(args.resolution / 8) * 8)
        raise InputError(f"--resolution {args.resolution} is not a multiple of 8; use {nearest}.")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed} is negative; use 0 or more.")
    if args.lr_scheduler == "piecewise_constant" and not re.fullmatch(STEP_RULES, args.lr_step_rules or ""):
        raise InputError(
            f"--lr_scheduler piecewise_constant needs --lr_step_rules such as 1:500,0.1, not {args.lr_step_rules!r}."
        )
    adapter_config(args)
    for requested, flag, package in (
        (args.use_8bit_adam, "--use_8bit_adam", "bitsandbytes"),
        (args.report_to == "wandb", "--report_to wandb", "wandb"),
    ):
        if requested and importlib.util.find_spec(package) is None:
            raise InputError(f"{flag} needs {package}, which is not installed; run `pip install {package}`.")
    check_output_dir(args.output_dir, args.resume_from_checkpoint)


def check_output_dir(output_dir: Path, resume_from_checkpoint: str | None) -> None:
    """Refuse an output folder that holds another run, or lies on a disk without room.

    Raises:
        InputError
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file; name a folder.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and resume_from_checkpoint is None:
        raise InputError(
            f"--output_dir {output_dir} holds another run; name a new folder, or continue that run with "
            "--resume_from_checkpoint latest."
        )
    existing = next(parent for parent in (output_dir, *output_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise InputError(
            f"--output_dir {output_dir} is on a disk with {free / 2**20:.0f} MiB free; a run needs "
            f"{MIN_FREE_BYTES / 2**20:.0f} MiB, so free some space or choose another disk."
        )
