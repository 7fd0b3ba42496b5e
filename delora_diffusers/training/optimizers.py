"""The optimizer and its learning-rate schedule."""

import argparse
from collections.abc import Sequence

import torch
from diffusers.optimization import get_scheduler

from delora_diffusers.adapter.tensors import Adapter


def build_optimizer(
    adapters: Sequence[Adapter], args: argparse.Namespace, control: torch.nn.Module | None = None
) -> torch.optim.Optimizer:
    """AdamW over the adapters' parameters and the control encoder's, with separate rates for A and B and for lambda."""
    groups = []
    for adapter in adapters:
        groups += adapter.parameter_groups(args.learning_rate, args.lambda_learning_rate, args.adam_weight_decay)
    if control is not None:
        groups.append({"params": list(control.parameters()), "lr": args.control_learning_rate})
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.use_8bit_adam:
        import bitsandbytes  # pyright: ignore[reportMissingImports]

        return bitsandbytes.optim.AdamW8bit(groups, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def build_lr_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace):
    """The learning-rate schedule, in optimizer steps."""

    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        step_rules=args.lr_step_rules,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
