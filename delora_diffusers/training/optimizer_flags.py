"""The optimizers of ``--optimizer``, their flags and defaults, and which flags go together. Imports no torch."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from delora_diffusers.errors import InputError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What the rest of the project needs to know about an optimizer.

    Attributes:
        constructor: ``module:class``. package: what to install for it.
        rate: the default learning rate as a multiple of AdamW's, or ``fixed_rate``, a number that fits every method.
        has_adams_moments: whether ``--adam_beta1``, ``--adam_beta2`` and ``--adam_epsilon`` mean what they do in Adam.
        trains_all: whether lambda and a control encoder are trained by it too. AdamW trains them otherwise: they have
            separate rates, which Prodigy and Adafactor's relative steps do not have, and are too small to save memory.
        separates_subjects: whether subjects that are stacked in one tensor do not affect each other.
        defaults: arguments that differ from the constructor's defaults.
    """

    constructor: str
    package: str | None = None
    rate: float = 1.0
    fixed_rate: float | None = None
    has_adams_moments: bool = False
    trains_all: bool = False
    separates_subjects: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


OPTIMIZERS = {
    "adamw": Optimizer("torch.optim:AdamW", has_adams_moments=True, trains_all=True, separates_subjects=True),
    "adamw8bit": Optimizer(
        "bitsandbytes.optim:AdamW8bit", "bitsandbytes", has_adams_moments=True, trains_all=True, separates_subjects=True
    ),
    # The defaults are what its authors recommend for diffusion models. From their usual d0 of 1e-6, the estimate needs
    # most of a run of 300 steps to grow to a rate that trains; they recommend up to 1e-4 then.
    "prodigy": Optimizer(
        "prodigyopt:Prodigy",
        "prodigyopt",
        fixed_rate=1.0,
        has_adams_moments=True,
        defaults={"d0": 1e-4, "use_bias_correction": True, "safeguard_warmup": True},
    ),
    "adamw_schedulefree": Optimizer(
        "schedulefree:AdamWScheduleFree",
        "schedulefree",
        has_adams_moments=True,
        trains_all=True,
        separates_subjects=True,
    ),
    # transformers' has the paper's relative steps and a first moment; torch.optim.Adafactor has neither.
    "adafactor": Optimizer("transformers.optimization:Adafactor"),
    # "Typically 3-10x smaller than that for AdamW" (Chen et al., NeurIPS 2023, arXiv 2302.06675, section 5).
    "lion": Optimizer("pytorch_optimizer:Lion", "pytorch-optimizer", rate=0.1, separates_subjects=True),
    # Its averages start at 0 without a correction, so the first steps are some ten times its rate.
    "came": Optimizer("pytorch_optimizer:CAME", "pytorch-optimizer", rate=0.1),
}

ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
EMA_DECAY = 0.9999
"""Diffusers' default. Its warm-up limits the decay to (1 + t) / (10 + t), so that of short runs is less."""
RELATIVE_STEP = 1e-2
"""The rate of Adafactor's relative steps up to step 10,000 (Shazeer and Stern, ICML 2018, section 8)."""


def add_optimizer_arguments(group: Any) -> None:
    group.add_argument("--optimizer", choices=list(OPTIMIZERS), help="default: adamw; docs/optimizers.md compares them")
    group.add_argument(
        "--optimizer_args",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="further arguments of the optimizer, for example d_coef=2 betas=0.9,0.99",
    )
    group.add_argument("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    group.add_argument("--adam_beta1", type=float, help="default: 0.9")
    group.add_argument("--adam_beta2", type=float, help="default: 0.999")
    group.add_argument("--adam_weight_decay", type=float, default=1e-2, help="weight decay of A and B; lambda has none")
    group.add_argument("--adam_epsilon", type=float, help="default: 1e-8")
    group.add_argument(
        "--use_ema", action="store_true", help="validate and save an exponential moving average of the weights"
    )
    group.add_argument("--ema_decay", type=float, help=f"largest decay of that average; default: {EMA_DECAY}")


def with_optimizer_defaults(args: argparse.Namespace, adamw_rate: float) -> argparse.Namespace:
    """Fill in the optimizer, and its default rate and moments, where nothing was given; returns new arguments.

    Args:
        adamw_rate: the method's default learning rate with AdamW.

    Raises:
        InputError: two flags name different optimizers, or an argument of the optimizer is not of the form KEY=VALUE.
    """
    args = argparse.Namespace(**vars(args))
    name = args.optimizer or ("adamw8bit" if args.use_8bit_adam else "adamw")
    if args.use_8bit_adam and name != "adamw8bit":
        raise InputError(f"--use_8bit_adam is --optimizer adamw8bit, but --optimizer is {name}; leave out one of them.")
    args.optimizer, args.use_8bit_adam = name, name == "adamw8bit"
    options = given_options(args)
    if args.learning_rate is None:
        kind = OPTIMIZERS[name]
        args.learning_rate = adamw_rate * kind.rate if kind.fixed_rate is None else kind.fixed_rate
        if options.get("relative_step") is True:
            args.learning_rate = RELATIVE_STEP
    if name in ("adamw", "adamw8bit"):
        for flag, default in ADAM_DEFAULTS.items():
            if getattr(args, flag) is None and ("eps" if flag == "adam_epsilon" else "betas") not in options:
                setattr(args, flag, default)
    if args.use_ema and args.ema_decay is None:
        args.ema_decay = EMA_DECAY
    return args


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The values of ``--optimizer_args`` by name: booleans, numbers, None, tuples of these, or else text.

    Raises:
        InputError: one is not of the form KEY=VALUE, or is given twice.
    """
    words: list[str] = []
    for word in args.optimizer_args:
        # In a YAML list, the comma of betas=0.9,0.99 separates two items.
        if words and "=" not in word and isinstance(_value(word), int | float):
            words[-1] += f",{word}"
        else:
            words.append(word)
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not (key and equals and text):
            raise InputError(f"--optimizer_args {word!r} is not of the form KEY=VALUE; write for example d_coef=2.")
        if key in options:
            raise InputError(f"--optimizer_args gives {key} twice; leave out one of them.")
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    text = text.strip().strip("()[]")
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def check_optimizer(args: argparse.Namespace) -> None:
    """Reject an optimizer that is not installed, and flags that do not go with it.

    ``optimizers.check_options`` checks its arguments, which needs its package.

    Raises:
        InputError
    """
    name, kind, options = args.optimizer, OPTIMIZERS[args.optimizer], given_options(args)
    module = kind.constructor.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(module) is None:
        raise InputError(
            f"--optimizer {name} needs {kind.package}, which is not installed; run `pip install {kind.package}`."
        )
    for flag in ADAM_DEFAULTS:
        argument = "eps" if flag == "adam_epsilon" else "betas"
        if getattr(args, flag) is None:
            continue
        if not kind.has_adams_moments:
            raise InputError(
                f"--{flag} belongs to Adam, which {name} is not; leave it out, or give {name}'s by --optimizer_args."
            )
        if argument in options:
            raise InputError(f"--{flag} and --optimizer_args {argument} are the same; leave out one of them.")
    if getattr(args, "subjects_file", None) is not None and not kind.separates_subjects:
        raise InputError(
            f"--optimizer {name} measures all subjects of --subjects_file together, so they would affect each other; "
            "use adamw, adamw_schedulefree or lion, or train them one after another."
        )
    if name == "adamw_schedulefree":
        if args.lr_scheduler != "constant":
            raise InputError(
                f"--lr_scheduler {args.lr_scheduler} is not for {name}, which needs no schedule; leave it out "
                "(--lr_warmup_steps works without it)."
            )
        if args.use_ema:
            raise InputError(f"--use_ema averages the weights, which {name} does itself; leave out one of them.")
        if args.adam_beta1 == 0 or options.get("betas", (1,))[:1] == (0,):
            raise InputError(f"--optimizer {name} needs a first beta above 0; leave it out for 0.9.")
    if options.get("relative_step") is True:
        if args.learning_rate != RELATIVE_STEP:
            raise InputError(
                "--optimizer_args relative_step=true sets the learning rate itself; leave out --learning_rate."
            )
        if args.lr_scheduler != "constant":
            raise InputError("--optimizer_args relative_step=true is a schedule itself; leave out --lr_scheduler.")
    if args.ema_decay is not None and not args.use_ema:
        raise InputError("--ema_decay belongs to --use_ema, which is not given; give both or neither.")
