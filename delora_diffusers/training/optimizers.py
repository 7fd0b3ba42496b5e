"""The optimizer and its learning-rate schedule."""

import argparse
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError, reason
from delora_diffusers.training.optimizer_flags import OPTIMIZERS, given_options

SET_BY_FLAGS = {"lr": "--learning_rate", "weight_decay": "--adam_weight_decay", "warmup_steps": "--lr_warmup_steps"}
NOT_OFFERED = {"params", "maximize", "foreach", "fused", "capturable", "differentiable", "fsdp_in_use", "args"}
"""Arguments of optimizers that do not change the result, or with which no training ends well."""


def build_optimizer(
    adapters: Sequence[Adapter], args: argparse.Namespace, control: nn.Module | None = None
) -> torch.optim.Optimizer:
    """``args.optimizer`` over the adapters' parameters and the control encoder's, with separate rates for A and B and
    for lambda. If it does not train all of them, AdamW trains lambda and the encoder; see ``optimizer_flags``."""
    matrices, others, groups = [], [], []
    for adapter in adapters:
        first, *rest = adapter.parameter_groups(args.learning_rate, args.lambda_learning_rate, args.adam_weight_decay)
        groups += [first, *rest]
        matrices.append(first)
        others += rest
    if control is not None:
        groups.append({"params": list(control.parameters()), "lr": args.control_learning_rate})
        others.append(groups[-1])
    options = optimizer_options(args)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    constructor = _constructor(args.optimizer)
    if OPTIMIZERS[args.optimizer].trains_all or not others:
        return constructor(groups, **options)
    return SideBySide([constructor(matrices, **options), torch.optim.AdamW(others, fused=True)], groups)


class SideBySide(torch.optim.Optimizer):
    """Optimizers of different parameters that step together.

    Args:
        optimizers: the optimizers.
        groups: their parameter groups, in the order in which ``param_groups`` should list them.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], groups: Sequence[Mapping[str, Any]]):
        self.optimizers = list(optimizers)
        self._order = [group["params"][0] for group in groups]
        super().__init__([parameter for group in groups for parameter in group["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # Schedulers and GradScaler read and write these groups; each is that of the optimizer that has it.
        by_first = {id(group["params"][0]): group for member in self.optimizers for group in member.param_groups}
        self.param_groups = [by_first[id(first)] for first in self._order]

    def step(self, closure: Any = None) -> None:
        for member in self.optimizers:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [member.state_dict() for member in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.optimizers, state_dict["optimizers"]):
            member.load_state_dict(state)
        self._share_groups()


def optimizer_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``args.optimizer`` that are the same for all parameters."""
    kind, given = OPTIMIZERS[args.optimizer], given_options(args)
    # Relative steps are meant for the scale of each parameter (Shazeer and Stern, ICML 2018, section 8).
    scaled = bool(given.get("scale_parameter", given.get("relative_step", False)))
    fixed_step = {"relative_step": False, "scale_parameter": scaled} if args.optimizer == "adafactor" else {}
    options = {**kind.defaults, **fixed_step}
    if kind.has_adams_moments:
        if "betas" not in given:
            options["betas"] = (_or(args.adam_beta1, 0.9), _or(args.adam_beta2, 0.999))
        if "eps" not in given:
            options["eps"] = _or(args.adam_epsilon, 1e-8)
    if args.optimizer == "adamw_schedulefree":
        options["warmup_steps"] = args.lr_warmup_steps
    return options | given


def _constructor(name: str) -> Any:
    module, _, attribute = OPTIMIZERS[name].constructor.partition(":")
    return getattr(importlib.import_module(module), attribute)


def check_options(args: argparse.Namespace) -> None:
    """Compare ``--optimizer_args`` with the optimizer's signature, and build the optimizer once to check its values.

    Raises:
        InputError: an argument is unknown, has another type, is a flag's, or has a value that is refused.
    """
    name, given = args.optimizer, given_options(args)
    parameters = inspect.signature(_constructor(name).__init__).parameters
    known = {
        key: parameter
        for key, parameter in list(parameters.items())[1:]
        if parameter.kind is not parameter.VAR_KEYWORD and key not in NOT_OFFERED and key not in SET_BY_FLAGS
    }
    for key, value in given.items():
        if key in SET_BY_FLAGS:
            raise InputError(f"--optimizer_args {key} is a flag; give {SET_BY_FLAGS[key]} instead.")
        if key not in known:
            raise InputError(f"--optimizer_args {key} is not an argument of {name}; use {', '.join(known)}.")
        wanted = _wanted(known[key], value)
        if wanted:
            raise InputError(f"--optimizer_args {key}={_text(value)} does not fit {name}; give {wanted}.")
    group = {"params": [nn.Parameter(torch.zeros(2, 2))], "lr": args.learning_rate}
    try:
        _constructor(name)([group], **optimizer_options(args))
    except (ValueError, TypeError, ArithmeticError, AssertionError, NotImplementedError) as error:
        raise InputError(f"{name} refuses its arguments ({reason(error)}); change --optimizer_args.") from error


def _wanted(parameter: inspect.Parameter, value: Any) -> str | None:
    """What a parameter takes, in words, if it is not a value such as this. Without an annotation, its default tells."""
    default, annotation = parameter.default, str(parameter.annotation)
    if value is None or value == "":
        return None if default is None else "a value"
    if isinstance(default, bool) or (default is None and "bool" in annotation):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, tuple):
        fits = isinstance(value, tuple) and len(value) == len(default) and all(map(_is_number, value))
        return None if fits else f"{len(default)} numbers with commas, for example {_text(default)}"
    if type(default) is int and (default != 0 or "int" in annotation):
        return None if type(value) is int else "an integer"
    return None if _is_number(value) else "a number"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def set_rates(schedule: Any) -> None:
    """Set the rates of the schedule's step. A checkpoint has those of a run that may have had fewer steps."""
    factors = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, rate, factor in factors:
        group["lr"] = rate * factor(schedule.last_epoch)


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
