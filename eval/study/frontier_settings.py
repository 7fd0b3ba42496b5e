"""What the study ``frontier`` trains: for each variant of a method, a grid of settings.

Every variant has the same number of settings, so that no frontier is better only because more was tried. The exception
is full fine-tuning, which needs a model for each subject: it has a fifth of the settings.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from eval.study.settings import Setting

BASE, REFERENCE = "none", "lora"
"""Keys of the base model, and of the variant that all others are compared with."""
BASE_SETTING = Setting("base model", None, BASE, {})
STRENGTHS = (0.7, 1.0)
CLIP_T_DROP = 0.01
CLIP_T_LOSSES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05)
"""Losses of CLIP-T, relative to the base model, at which every envelope is compared with that of the reference."""
SCHEDULES = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
"""What ``--schedules`` may give; the others need more flags."""
AXES = ("multipliers", "bounds", "schedules", "step_multipliers")
"""Flags that replace a dimension of every grid."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """All combinations of some settings.

    Attributes:
        multipliers: of the default learning rate. step_multipliers: of the default number of steps.
        bounds: of the variants that have one, see ``Variant.bound``. schedules: of the learning rate.
    """

    multipliers: tuple[float, ...]
    schedules: tuple[str, ...] = ("constant", "cosine")
    step_multipliers: tuple[float, ...] = (1.0, 3.0)
    bounds: tuple[float | None, ...] = (None,)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A method with what distinguishes it from others of the same method.

    Attributes:
        train: its flags of the training script. bound: the flag that bounds its update, if it has one.
    """

    title: str
    method: str
    grids: tuple[Grid, ...]
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bound: str | None = None


BOUNDS = (0.15, 0.2, 0.3, 0.45)
DELORA = (
    Grid((0.25, 1.0), ("cosine",), (1.0, 3.0), BOUNDS),
    Grid((0.5,), ("constant",), (1.0,), BOUNDS),  # a constant higher rate does not settle
)
FROBENIUS, ZERO = {"weight_norm": "frobenius"}, {"start": "zero"}
COFT_BOUNDS = (6e-5, 6e-4)
"""The first is that of OFT's scripts; it hardly lets the narrow layers of the miniature move."""

VARIANTS = {
    "delora": Variant("DeLoRA", "delora", DELORA, bound="relative_bound"),
    "delora-frobenius": Variant("DeLoRA, Frobenius scale", "delora", DELORA, FROBENIUS, "relative_bound"),
    "delora-zero": Variant("DeLoRA, zero start", "delora", DELORA, ZERO, "relative_bound"),
    "delora-frobenius-zero": Variant(
        "DeLoRA, Frobenius scale, zero start", "delora", DELORA, FROBENIUS | ZERO, "relative_bound"
    ),
    "lora": Variant("LoRA", "lora", (Grid((0.25, 0.5, 1.0, 2.0, 4.0)),)),
    "dora": Variant("DoRA", "dora", (Grid((0.25, 0.5, 1.0, 2.0, 4.0)),)),
    "etherplus": Variant("ETHER+", "etherplus", (Grid((0.25, 1.0, 2.0, 4.0, 16.0)),)),
    "coft": Variant(
        "COFT",
        "oft",
        (
            Grid((1.0, 4.0, 16.0, 64.0), step_multipliers=(1.0,), bounds=COFT_BOUNDS),
            Grid((4.0, 16.0), ("cosine",), (3.0,), COFT_BOUNDS),
        ),
        bound="coft_eps",
    ),
    "full": Variant(
        "full fine-tuning",
        "full",
        (Grid((4.0, 16.0, 64.0), ("cosine",), (1.0,)), Grid((16.0,), ("cosine",), (3.0,))),
    ),
}
"""By the key that ``--methods`` takes."""


def settings_of(key: str, replaced: Mapping[str, Sequence[Any] | None]) -> list[Setting]:
    """The distinct settings of a variant.

    Args:
        replaced: by name of ``AXES``, what replaces this dimension of its grids; None keeps it. ``bounds`` are those of
            DeLoRA.
    """
    variant, settings = VARIANTS[key], []
    for grid in variant.grids:
        axes = {name: replaced.get(name) or getattr(grid, name) for name in AXES}
        if variant.bound != "relative_bound":
            axes["bounds"] = grid.bounds
        for rate, bound, schedule, steps in itertools.product(*(axes[name] for name in AXES)):
            train = {"learning_rate": METHODS[variant.method].learning_rate * rate, **variant.train}
            if variant.bound is not None:
                train[variant.bound] = bound
            setting = Setting(key, rate, variant.method, train | {"lr_scheduler": schedule, "steps": float(steps)})
            if setting not in settings:
                settings.append(setting)
    return settings


def check_keys(keys: Sequence[str]) -> None:
    """Reject keys of ``--methods`` that have no variant.

    Raises:
        InputError
    """
    unknown = [key for key in keys if key not in VARIANTS]
    if unknown:
        raise InputError(f"--methods {unknown[0]} is not part of frontier; choose from {', '.join(VARIANTS)}.")
