"""What each study trains: the paper's figures and tables as lists of settings.

Source: Bini, Girrbach, Akata, ICLR 2025 (arXiv 2503.18225), figures 2, 3, 5 and 6, tables 1 and 2.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from eval.methods import LAMBDA_LEARNING_RATE, LEARNING_RATES, TITLES
from eval.plan import Plan

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Of the learning rate."""
MULTIPLES = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Of the training steps."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a study, trained on every subject and seed.

    Attributes:
        label: the curve or the row. x: its place on the curve; None in a table.
        train: flags of the training script; ``steps`` stands for a multiple of the usual number of steps.
    """

    label: str
    x: float | None
    method: str
    train: dict[str, Any]

    @property
    def slug(self) -> str:
        """The name of its run: what is trained, so that studies share what they have in common."""
        values = {name: f"{value:.10g}" if isinstance(value, float) else value for name, value in self.train.items()}
        return "-".join([self.method, *(f"{name}-{value}" for name, value in values.items())])


Trial = tuple[Setting, Plan, argparse.Namespace]
"""A setting, its benchmark run, and that run's options."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A figure or a table.

    Attributes:
        shows: what it is, for its caption. axis: what x is; None for a table.
        settings: made from the methods asked for (None for the study's own) and the places on the axis.
        places: the usual ones. compared: those whose differences from the usual setting the caption says.
    """

    shows: str
    axis: str | None
    settings: Callable[[Sequence[str] | None, Sequence[float]], list[Setting]]
    places: tuple[float, ...] = FACTORS
    compared: tuple[float, ...] = (4.0, 8.0, 16.0)


def rates(*usual: str) -> Callable[[Sequence[str] | None, Sequence[float]], list[Setting]]:
    """Methods at their rate times each factor."""

    def settings(methods: Sequence[str] | None, factors: Sequence[float]) -> list[Setting]:
        return [
            Setting(TITLES[method], factor, method, {"learning_rate": LEARNING_RATES[method] * factor})
            for method in methods or usual
            for factor in factors
        ]

    return settings


def delora_rates(methods: Sequence[str] | None, factors: Sequence[float]) -> list[Setting]:
    """DeLoRA's two rates, apart and together."""
    found = []
    for label, on_factors, on_lambda in (("A and B", 1, 0), ("lambda", 0, 1), ("both", 1, 1)):
        for factor in factors:
            train = {"learning_rate": LEARNING_RATES["delora"] * (factor if on_factors else 1)}
            if on_lambda and factor != 1:
                train["lambda_learning_rate"] = LAMBDA_LEARNING_RATE * factor
            found.append(Setting(f"rate of {label}", factor, "delora", train))
    return found


def starts(methods: Sequence[str] | None, factors: Sequence[float]) -> list[Setting]:
    """A frozen copy of the random start against a start from B = 0."""
    return [
        Setting(label, factor, "delora", {"learning_rate": LEARNING_RATES["delora"] * factor} | start)
        for label, start in (("frozen copy", {}), ("zero start", {"start": "zero"}))
        for factor in factors
    ]


def prolonged(methods: Sequence[str] | None, multiples: Sequence[float]) -> list[Setting]:
    """Methods at their rate, trained up to ten times as long."""
    return [
        Setting(TITLES[method], multiple, method, {"learning_rate": LEARNING_RATES[method], "steps": multiple})
        for method in methods or ("delora", "lora", "dora", "etherplus")
        for multiple in sorted(multiples)
    ]


def ablation(methods: Sequence[str] | None, places: Sequence[float]) -> list[Setting]:
    """From LoRA to DeLoRA and from ETHER+ to DeLoRA, a change in each row (the paper's tables 1 and 2)."""
    rows = (
        ("LoRA", "lora", {}),
        ("normalized, boundary, no weight scaling", "delora", {"weight_norm": "none"}),
        ("one-sided ETHER+", "etherplus_onesided", {}),
        ("learnable boundary: lambda (uu' - vv') W", "delora_symmetric", {"rank": 1}),
        ("rank r: lambda/r (U S U' - V T V') W", "delora_symmetric", {}),
        ("asymmetric: lambda/r (B X A - D P C) W", "delora_multiplicative", {}),
        ("DeLoRA", "delora", {}),
    )
    return [
        Setting(label, None, method, {"learning_rate": LEARNING_RATES[method]} | more)
        for label, method, more in rows
        if methods is None or method in methods
    ]


STUDIES = {
    "lr": Study(
        "Every method at its usual learning rate times 1/8 to 32 (the paper's figure 2).",
        "learning rate, times the usual",
        rates("delora", "lora", "dora", "etherplus"),
    ),
    "delora-rates": Study(
        "DeLoRA's rate of A and B, of lambda, and of both, times 1/8 to 32 (the paper's figure 6).",
        "learning rate, times the usual",
        delora_rates,
    ),
    "dora-magnitude": Study(
        "DoRA with its magnitude trained and fixed, at its usual rate times 1/8 to 32 (the paper's figure 5).",
        "learning rate, times the usual",
        rates("dora", "dora_fixed_magnitude"),
    ),
    "start": Study(
        "DeLoRA from a frozen copy of its random start and from B = 0, at its usual rate times 1/8 to 32.",
        "learning rate, times the usual",
        starts,
    ),
    "prolonged": Study(
        "Every method at its usual rate, trained for up to ten times the usual steps (the paper's figure 3).",
        "training steps, times the usual",
        prolonged,
        MULTIPLES,
        (3.0, 5.0, 10.0),
    ),
    "ablation": Study(
        "From LoRA to DeLoRA and from ETHER+ to DeLoRA, row by row (the paper's table 1).",
        None,
        ablation,
        (),
    ),
}
