"""Checks of the flags of both training scripts, before anything is loaded."""

import argparse
import importlib.util
import math
import re

from delora_diffusers.errors import InputError
from delora_diffusers.families.checks import check_side
from delora_diffusers.families.quantization import PACKAGES, check_base_precision
from delora_diffusers.methods.table import METHODS
from delora_diffusers.outputs import check_run_folder, is_first_process
from delora_diffusers.training.arguments import adapter_config
from delora_diffusers.training.optimizer_flags import check_optimizer
from delora_diffusers.training.run_folder import check_hub_login

OF_METHODS = {
    "alpha": ("lora", "dora", "dora_fixed_magnitude"),
    "blocks": ("ether", "etherplus", "etherplus_onesided", "oft"),
}
"""Flags that other methods would ignore."""

STEP_RULES = r"(\d*\.?\d+:\d+,)*\d*\.?\d+"
"""FACTOR:STEP pairs, each multiplying the learning rate up to that step, then the final factor."""

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


def _check_numbers(args: argparse.Namespace) -> None:
    for name, (smallest, largest) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not smallest <= value <= largest:
            raise InputError(f"--{name} {value} is not between {smallest:g} and {largest:g}; choose another value.")
    if not isinstance(args.timestep_shift, str | None) and not 1e-3 <= args.timestep_shift <= 1e3:
        raise InputError(f"--timestep_shift {args.timestep_shift} is not between 0.001 and 1000; choose another value.")


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
