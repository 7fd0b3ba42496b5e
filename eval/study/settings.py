"""What each study trains: the paper's figures and tables as lists of settings.

Source: Bini, Girrbach, Akata, ICLR 2025 (arXiv 2503.18225), figures 2, 3, 5 and 6, tables 1 and 2.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from delora_diffusers.methods.table import LAMBDA_LEARNING_RATE, METHODS

RATE_MULTIPLIERS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
STEP_MULTIPLIERS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
RATE_AXIS = "multiple of the default learning rate"
STEP_AXIS = "multiple of the default training steps"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a study, trained on every subject and seed.

    Attributes:
        label: of the curve, or of the row. x: position on the axis; None in a table.
        train: flags of the training script; ``steps`` is a multiple of the default number of steps.
    """

    label: str
    x: float | None
    method: str
    train: dict[str, Any]

    @property
    def slug(self) -> str:
        """The folder name of its run. It depends only on what is trained, so that studies can share runs."""
        values = {name: f"{value:.10g}" if isinstance(value, float) else value for name, value in self.train.items()}
        return "-".join([self.method, *(f"{name}-{value}" for name, value in values.items())])


MakeSettings = Callable[[Sequence[str] | None, Sequence[float]], list[Setting]]
"""Settings from the chosen methods (None for the study's defaults) and the multipliers on the axis."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A figure or a table.

    Attributes:
        shows: the first line of its caption. axis: what x is; None for a table.
        multipliers: default positions on the axis.
        compared: positions whose differences from the default the caption reports.
    """

    shows: str
    axis: str | None
    settings: MakeSettings
    multipliers: tuple[float, ...] = RATE_MULTIPLIERS
    compared: tuple[float, ...] = (4.0, 8.0, 16.0)


def at_rate(method: str, multiplier: float, label: str | None = None, **train: Any) -> Setting:
    """A method at a multiple of its default learning rate."""
    rate = METHODS[method].learning_rate * multiplier
    return Setting(label or METHODS[method].title, multiplier, method, {"learning_rate": rate} | train)


def rates(*defaults: str) -> MakeSettings:
    """The given methods, by default these, at every multiple of their default rate."""

    def settings(methods: Sequence[str] | None, multipliers: Sequence[float]) -> list[Setting]:
        return [at_rate(method, multiplier) for method in methods or defaults for multiplier in multipliers]

    return settings


def delora_rates(methods: Sequence[str] | None, multipliers: Sequence[float]) -> list[Setting]:
    """DeLoRA's two learning rates, varied separately and together."""
    settings = []
    for label, vary_factors, vary_lambda in (("A and B", 1, 0), ("lambda", 0, 1), ("both", 1, 1)):
        for multiplier in multipliers:
            rate = METHODS["delora"].learning_rate * (multiplier if vary_factors else 1)
            train = {"learning_rate": rate}
            if vary_lambda and multiplier != 1:
                train["lambda_learning_rate"] = LAMBDA_LEARNING_RATE * multiplier
            settings.append(Setting(f"rate of {label}", multiplier, "delora", train))
    return settings


def starts(methods: Sequence[str] | None, multipliers: Sequence[float]) -> list[Setting]:
    """A frozen copy of the random start against a start from B = 0."""
    return [
        at_rate("delora", multiplier, label, **start)
        for label, start in (("frozen copy", {}), ("zero start", {"start": "zero"}))
        for multiplier in multipliers
    ]


def prolonged(methods: Sequence[str] | None, multipliers: Sequence[float]) -> list[Setting]:
    """Methods at their default rate, trained for up to ten times as many steps."""
    return [
        Setting(METHODS[m].title, multiplier, m, {"learning_rate": METHODS[m].learning_rate, "steps": multiplier})
        for m in methods or ("delora", "lora", "dora", "etherplus")
        for multiplier in sorted(multipliers)
    ]


def ablation(methods: Sequence[str] | None, multipliers: Sequence[float], maps: bool = False) -> list[Setting]:
    """From LoRA to DeLoRA and from ETHER+ to DeLoRA, one change per row (the paper's tables 1 and 2).

    Args:
        methods: the rows of these methods; a method without a row in the tables gets one at the end.
        maps: whether the learning rates are those for semantic maps.
    """
    rows = (
        ("LoRA", "lora", {}),
        ("normalized, boundary, no weight scaling", "delora", {"weight_norm": "none"}),
        ("one-sided ETHER+", "etherplus_onesided", {}),
        ("learnable boundary: lambda (uu' - vv') W", "delora_symmetric", {"rank": 1}),
        ("rank r: lambda/r (U S U' - V T V') W", "delora_symmetric", {}),
        ("asymmetric: lambda/r (B X A - D P C) W", "delora_multiplicative", {}),
        ("DeLoRA", "delora", {}),
    )
    others = [method for method in methods or () if method not in {method for _, method, _ in rows}]
    return [
        Setting(label, None, method, {"learning_rate": METHODS[method].default_rate(maps)} | train)
        for label, method, train in (*rows, *((METHODS[method].title, method, {}) for method in others))
        if methods is None or method in methods
    ]


STUDIES = {
    "lr": Study(
        "Every method at 1/8x to 32x its default learning rate (the paper's figure 2).",
        RATE_AXIS,
        rates("delora", "lora", "dora", "etherplus"),
    ),
    "delora-rates": Study(
        "DeLoRA with the rate of A and B, of lambda, and of both at 1/8x to 32x the default (the paper's figure 6).",
        RATE_AXIS,
        delora_rates,
    ),
    "dora-magnitude": Study(
        "DoRA with trained and with fixed magnitude at 1/8x to 32x its default learning rate (the paper's figure 5).",
        RATE_AXIS,
        rates("dora", "dora_fixed_magnitude"),
    ),
    "start": Study(
        "DeLoRA from a frozen copy of its random start and from B = 0, at 1/8x to 32x its default learning rate.",
        RATE_AXIS,
        starts,
    ),
    "prolonged": Study(
        "Every method at its default learning rate, trained for up to 10x the default steps (the paper's figure 3).",
        STEP_AXIS,
        prolonged,
        STEP_MULTIPLIERS,
        (3.0, 5.0, 10.0),
    ),
    "ablation": Study(
        "From LoRA to DeLoRA and from ETHER+ to DeLoRA, row by row (the paper's table 1).",
        None,
        ablation,
        (),
    ),
}
