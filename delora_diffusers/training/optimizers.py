"""The optimizer and its learning-rate schedule."""

import argparse
from collections.abc import Sequence

import torch
from diffusers.optimization import SchedulerType, get_scheduler

from delora_diffusers.adapter import Adapter
from delora_diffusers.errors import InputError


def build_optimizer(adapters: Sequence[Adapter], args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW over the adapters' groups: A and B at one rate, lambda at its own (``group['name']`` says which)."""
    groups = []
    for adapter in adapters:
        groups += adapter.parameter_groups(args.learning_rate, args.lambda_learning_rate, args.adam_weight_decay)
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """The schedule, in optimizer steps.

    Raises:
        InputError: ``piecewise_constant`` without its rules, or with rules that cannot be read.
    """
    if args.lr_scheduler == SchedulerType.PIECEWISE_CONSTANT.value and not args.lr_step_rules:
        raise InputError("--lr_scheduler piecewise_constant needs --lr_step_rules, for example 1:500,0.1.")
    cycles = args.lr_num_cycles
    if args.lr_scheduler == "cosine_with_restarts":
        cycles = int(cycles)
    elif args.lr_scheduler == "cosine":
        cycles = cycles / 2  # diffusers counts half waves here
    try:
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            step_rules=args.lr_step_rules,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=cycles,
            power=args.lr_power,
        )
    except (ValueError, IndexError) as error:
        raise InputError(f"--lr_step_rules {args.lr_step_rules} cannot be read ({error}); write 1:500,0.1.") from error
