"""The flatness of methods on several base models, in one table and one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from delora_diffusers.wording import counted
from eval.study import captions, figures
from eval.study.flatness import (
    DEFAULT,
    KEYS,
    SCORES,
    change_by_noise,
    failed_settings,
    largest_changes,
    with_brackets,
)
from eval.study.grids import percentiles, resampled

COLUMNS = ("model", "method", "protocol", "subject", "seed", *KEYS, *SCORES)
"""What the rows of a study have."""
RUN = ("model", "method", *KEYS, "subject", "seed")
"""The columns that tell runs apart."""
COMPARED = ("dino", "clip_t")
CHANGES = [f"{SCORES[score]} over {span}" for span in ("rates and steps", "rates") for score in COMPARED]
"""Titles of the columns: each score over the groups of ``spans_of``."""


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of the study on several base models, without settings that did not finish for all subjects and seeds.

    Args:
        tables: rows of the study; those of one base model may be in several.

    Raises:
        InputError: a run is there twice.
    """
    rows = pd.concat([captions.first_protocol(table) for table in tables if len(table)], ignore_index=True)
    twice = rows[rows.duplicated(list(RUN))]
    if len(twice):
        model, method = twice[["model", "method"]].iloc[0]
        raise InputError(f"the rows of {METHODS[method].title} on {model} are there twice; give each study once.")
    rows = rows.dropna(subset=["dino", "clip_t"])
    counts = rows.groupby(["model", "method", *KEYS])["dino"].transform("size")
    complete = counts == counts.groupby(rows["model"]).transform("max")
    return pd.DataFrame(rows[complete]).sort_values("x", kind="stable")


def joint_table(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the largest changes of DINO and CLIP-T of each method on each base model, over the whole grid
    and over the learning rates alone, at the default number of steps.

    Args:
        rows: see ``joined``.
    """
    header = ["", "", *CHANGES, "missing"]
    cells = []
    for model, of_model in rows.groupby("model", sort=False):
        grid = of_model[list(KEYS)].drop_duplicates()
        for method in of_model["method"].unique():
            of_method, missing = captions.where(of_model, "method", method), failed_settings(of_model, method)
            rates = [figures.multiple(x) for x, steps in missing if np.isclose(steps, DEFAULT[1])]
            without = f", without {', '.join(rates)}x" if rates else ""
            changes = [
                with_brackets(largest_changes(group, score)["change"]) + note if len(group) else ""
                for group, note in zip(spans_of(of_method), ("", without))
                for score in COMPARED
            ]
            count = f"{len(missing)} of {len(grid)} settings" if missing else ""
            cells.append([str(model), METHODS[method].title, *changes, count])
    return header, cells


def noise_table(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the changes that noise alone would make, see ``flatness.change_by_noise``.

    Args:
        rows: see ``joined``.
    """
    cells = []
    for (model, method), of_method in cast(Any, rows.groupby(["model", "method"], sort=False)):
        changes = [change_by_noise(group, score) for group in spans_of(of_method) for score in COMPARED]
        numbers = ["" if np.isnan(change) else f"{change:.3f}" for change in changes]
        cells.append([model, METHODS[method].title, *numbers])
    return ["", "", *CHANGES], cells


def difference_table(rows: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and rows: paired differences of DINO and CLIP-T with 95% bootstrap intervals over subjects.

    The first method of each base model minus every other, at the default rate and each number of steps; and the first
    with other numbers of steps minus the default number, as the mean over rates.

    Args:
        rows: see ``joined``.
    """
    cells = []
    for model, of_model in rows.groupby("model", sort=False):
        first, *others = of_model["method"].unique()
        of_first = captions.where(of_model, "method", first)
        usual, groups = spans_of(of_first)[1], {}
        for other in others:
            for steps in sorted(set(of_model["step_multiplier"])):
                title = (
                    f"{METHODS[first].title} minus {METHODS[other].title}, 1x rate, {figures.multiple(steps)}x steps"
                )
                tables = (of_first, captions.where(of_model, "method", other))
                groups[title] = [at_default_rate(table, steps) for table in tables]
        for steps in sorted(set(of_first["step_multiplier"]) - set(usual["step_multiplier"])):
            title = f"{METHODS[first].title}, {figures.multiple(steps)}x minus 1x the steps, mean over rates"
            groups[title] = [captions.where(of_first, "step_multiplier", steps), usual]
        for title, (of_setting, reference) in groups.items():
            changes = [with_brackets(paired_difference(of_setting, reference, score)) for score in COMPARED]
            cells.append([str(model), title, *changes])
    return ["", "", *(SCORES[score] for score in COMPARED)], cells


def at_default_rate(of_method: pd.DataFrame, steps: float) -> pd.DataFrame:
    """The rows of one method at the default rate and a multiple of the default number of steps."""
    return pd.DataFrame(of_method[np.isclose(of_method[list(KEYS)], (DEFAULT[0], steps)).all(axis=1)])


def paired_difference(rows: pd.DataFrame, reference: pd.DataFrame, score: str) -> tuple[float, float, float] | None:
    """Mean of a score minus that of the reference over the subjects of both, with its 95% interval; None without any.

    Args:
        rows, reference: of one method each; the mean over a subject's rows counts.
    """
    by_subject: Any = [table.groupby("subject")[score].mean() for table in (rows, reference)]
    differences = (by_subject[0] - by_subject[1]).dropna().to_numpy(float)
    if not len(differences):
        return None
    means = resampled(len(differences)) @ differences / len(differences)
    return (float(differences.mean()), *percentiles(means))


def spans_of(of_method: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of one method over rates and steps, and over rates alone, at the default number of steps."""
    return [of_method, pd.DataFrame(of_method[np.isclose(of_method["step_multiplier"], DEFAULT[1])])]


def note_of(rows: pd.DataFrame) -> str:
    """How many subjects and seeds each base model was trained on."""
    counts = [
        f"{model}: {counted(of_model['subject'].nunique(), 'subject')}, {counted(of_model['seed'].nunique(), 'seed')}"
        for model, of_model in rows.groupby("model", sort=False)
    ]
    return f"{'; '.join(counts)}. In brackets: 95% bootstrap interval over subjects."


def plot_joint(rows: pd.DataFrame, path: Path) -> None:
    """DINO and CLIP-T of every setting, a column of panels per base model, as PNG and SVG.

    Args:
        rows: see ``joined``. path: without a suffix.
    """
    by_model = {
        str(model): of_model.groupby(["method", "step_multiplier", "x"], sort=False)[["dino", "clip_t"]]
        .mean()
        .reset_index()
        for model, of_model in rows.groupby("model", sort=False)
    }
    figures.plot_models(by_model, "multiple of the published rate", path)
