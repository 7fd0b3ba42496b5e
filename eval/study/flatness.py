"""How much the scores of a method depend on its learning rate and its number of steps: a grid of both.

Every method is trained with its default settings at every multiple of its published learning rate and of the default
number of steps. The flatter the scores, the less there is to search on a new subject.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from delora_diffusers.atomic import write_text
from delora_diffusers.methods.table import METHODS
from delora_diffusers.wording import counted
from eval.benchmark.results import RESAMPLES
from eval.benchmark.tables import markdown
from eval.study import captions, figures
from eval.study.grids import by_setting, percentiles, resampled, subject_means
from eval.study.settings import RATE_AXIS, Setting, at_rate
from eval.study.trials import Trial, base_model_name, run_study, write_rows

SHOWS = "Every method over a grid of multiples of its default learning rate and of the default number of steps."
COMPARED = ("delora", "lora", "dora")
RATES = (1 / 8, 1 / 2, 1.0, 2.0, 8.0)
STEPS = (1 / 3, 1.0, 3.0)
SCORES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}
KEYS = ("x", "step_multiplier")
"""The columns of both axes: the multiples of the default learning rate and of the default number of steps."""
DEFAULT = (1.0, 1.0)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """The grid of every method. A longer training follows the shorter one, which it may continue."""
    rates, steps = options.multipliers or RATES, options.step_multipliers or STEPS
    return [
        at_rate(method, rate, label_of(method, multiple), steps=multiple)
        for method in options.methods or COMPARED
        for rate in sorted(rates)
        for multiple in sorted(steps)
    ]


def label_of(method: str, step_multiplier: float) -> str:
    return f"{METHODS[method].title}, {figures.multiple(step_multiplier)}x steps"


def run(options: argparse.Namespace) -> None:
    """Run the grid; write its rows, its figure, its caption and an image per setting."""
    path, settings = options.output_dir / options.name, settings_of(options)
    multiples = {setting.label: setting.train["steps"] for setting in settings}

    def write_all(rows: pd.DataFrame, trials: Sequence[Trial]) -> Path:
        rows.insert(0, "model", base_model_name(options))
        rows.insert(3, "step_multiplier", rows["label"].map(multiples))
        write_rows(path.with_suffix(".parquet"), rows)
        of_method = len(settings) // len(options.methods or COMPARED)
        caption = write(path, rows, of_method, captions.unfinished(trials, rows))
        write_images(path, trials)
        return caption

    run_study(options, settings, write_all)


def write_images(path: Path, trials: Sequence[Trial]) -> None:
    """An image of the first subject per setting: a row per method, a column per number of steps and learning rate.

    Args:
        path: of the study's figure, without a suffix; the grid is ``PATH-images``.
    """
    subject = trials[0].plan.benchmark.subjects[0]
    rows: dict[str, dict[str, Path]] = {}
    columns = []
    for trial in sorted(trials, key=lambda trial: (trial.setting.train["steps"], trial.setting.x or 0)):
        steps, rate = (figures.multiple(value) for value in (trial.setting.train["steps"], trial.setting.x or 0))
        columns.append(f"{rate}x rate\n{steps}x steps")
        image = captions.shown_image(trial, subject)
        if image is not None:
            rows.setdefault(METHODS[trial.setting.method].title, {})[columns[-1]] = image
    order = dict.fromkeys(METHODS[trial.setting.method].title for trial in trials)
    ordered = {title: rows[title] for title in order if title in rows}
    if ordered:
        title = captions.shown_prompt(trials[0], subject)
        figures.plot_images(ordered, list(dict.fromkeys(columns)), None, title, path.with_name(f"{path.name}-images"))


def largest_changes(rows: pd.DataFrame, score: str) -> dict[str, Any]:
    """How far a score of one method moves over its grid, each with its 95% bootstrap interval over subjects.

    ``change`` is the highest minus the lowest mean over subjects; ``deviation`` is the largest distance from the mean
    at the default, None if that did not finish. In a resample both are computed from its own means, so that noise in
    the means makes them larger on average.

    Args:
        rows: of one method and protocol.

    Returns:
        ``change`` and ``deviation``, (value, low, high) each; ``lowest``, ``highest`` and ``default``, means.
    """
    table = by_setting(rows, KEYS, score)
    weights = resampled(table.shape[1])
    everybody = np.ones((1, table.shape[1]))
    values = table.to_numpy(float)
    means, resamples = subject_means(values, everybody), subject_means(values, weights)

    def with_interval(distance: Any) -> tuple[float, float, float]:
        return (float(distance(means)[0]), *percentiles(distance(resamples)))

    result: dict[str, Any] = {"lowest": float(means.min()), "highest": float(means.max())}
    result["change"] = with_interval(lambda m: np.nanmax(m, axis=1) - np.nanmin(m, axis=1))
    at_default = [i for i, key in enumerate(table.index) if key == DEFAULT]
    result |= {"default": None, "deviation": None}
    if at_default:
        result["default"] = float(means[0, at_default[0]])
        result["deviation"] = with_interval(lambda m: np.nanmax(np.abs(m - m[:, at_default]), axis=1))
    return result


def change_by_noise(rows: pd.DataFrame, score: str) -> float:
    """The largest change to expect if no setting were better than another: that of means which differ only by noise.

    The noise is what the means of settings and of subjects do not explain. NaN with a single subject or setting.

    Args:
        rows: see ``largest_changes``.
    """
    values = by_setting(rows, KEYS, score).dropna().to_numpy(float)
    settings, subjects = values.shape
    if min(values.shape) < 2:
        return float("nan")
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    residuals *= np.sqrt(values.size / ((settings - 1) * (subjects - 1)))  # fitted means make them smaller
    noise = np.random.default_rng(0).choice(residuals.ravel(), (RESAMPLES, settings, subjects)).mean(axis=2)
    return float(np.ptp(noise, axis=1).mean())


def failed_settings(rows: pd.DataFrame, method: str) -> list[tuple[float, float]]:
    """The settings at which another method has scores and this method has none, because every training failed."""
    finished = rows[rows["method"] == method]
    grid, of_method = (set(zip(table["x"], table["step_multiplier"])) for table in (rows, finished))
    return sorted(grid - of_method)


def change_table(rows: pd.DataFrame, expected: int | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how far each score of each method moves over the grid.

    Args:
        rows: of one protocol. expected: settings per method; None counts those at which any method has scores.
    """
    header = ["", "", "default", "lowest", "highest", "largest change", "largest deviation from the default", "failed"]
    cells = []
    for method, group in rows.groupby("method", sort=False):
        finished = len(group[list(KEYS)].drop_duplicates())
        missing = len(failed_settings(rows, str(method))) if expected is None else expected - finished
        for score, title in SCORES.items():
            moved = largest_changes(group, score)
            numbers = ["" if moved[name] is None else f"{moved[name]:.3f}" for name in ("default", "lowest", "highest")]
            changes = [with_brackets(moved[name]) for name in ("change", "deviation")]
            settings = f"{missing} of {finished + missing} settings" if missing else ""
            cells.append([METHODS[str(method)].title, title, *numbers, *changes, settings])
    return header, cells


def with_brackets(interval: tuple[float, float, float] | None) -> str:
    """``0.021 [0.015, 0.034]``; empty for None."""
    return "" if interval is None else f"{interval[0]:.3f} [{interval[1]:.3f}, {interval[2]:.3f}]"


def write(path: Path, rows: pd.DataFrame, settings: int, missing: str) -> Path:
    """The figure and its caption with all numbers: ``path`` with .png, .svg and .md.

    Args:
        settings: number of settings of each method. missing: see ``captions.unfinished``.
    """
    model = rows["model"].iloc[0]
    rows = captions.first_protocol(rows)
    table = captions.tabulate(rows)
    steps = rows.drop_duplicates("label").set_index("label")["step_multiplier"]
    table["step_multiplier"] = table["label"].map(steps)
    figures.plot_grid(table, RATE_AXIS, path)
    seeds, subjects = (rows[name].nunique() for name in ("seed", "subject"))
    parts = [
        f"![{SHOWS}]({path.name}.png)\n",
        f"{SHOWS}\n",
        f"Base model {model}, {counted(subjects, 'subject')}, {counted(seeds, 'seed')}. In brackets: 95% bootstrap "
        "interval over subjects.\n"
        "Largest change: highest minus lowest mean over the grid. Settings where every training failed have no\n"
        f"scores.{missing}\n",
        markdown(*change_table(rows, settings), left=2),
        "All settings; ±: standard deviation over seeds.\n",
        markdown(*captions.means(table, RATE_AXIS)),
    ]
    file = path.with_suffix(".md")
    write_text(file, "\n".join(parts))
    return file
