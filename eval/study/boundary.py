"""DeLoRA's scores over its boundary: how far it can be raised on a base model before prompts are lost.

Each relative bound is trained at the published learning rate and at a higher one. The base model is scored too. The
result is two bounds, see ``KNEES``: a boundary between them learns the subject and still follows the prompt.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from delora_diffusers.atomic import write_text
from delora_diffusers.names import WEIGHTS_NAME
from eval.benchmark.results import mean_and_interval
from eval.benchmark.tables import markdown
from eval.study import captions, figures
from eval.study.grids import by_setting, percentiles, resampled, subject_means
from eval.study.settings import Setting, at_rate
from eval.study.trials import Trial, base_model_name, kept_step, run_study, write_rows

SHOWS = "DeLoRA over relative bounds, at the published learning rate and above."
BOUNDS = (0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45)
RATES = (1.0, 4.0)
BASE = Setting("base model", None, "none", {})
CLIP_T_LOSS = 0.01
"""What CLIP-T may lose against the base model."""
DINO_SHARE = 0.9
"""The share of the highest mean DINO over all bounds that must be reached."""
KNEES = {
    "clip_t": f"CLIP-T: the largest bound up to which it stays within {CLIP_T_LOSS} of the base model's",
    "dino": f"DINO: the bound from which it reaches {DINO_SHARE:.0%} of its maximum over the bounds",
}
"""What the two bounds mean, by score."""

Interval = tuple[float, float, float]
"""A value and its 95% interval."""


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """DeLoRA at every bound and rate, and the base model at the end."""
    bounds, rates = sorted(options.bounds or BOUNDS), sorted(options.multipliers or RATES)
    settings = []
    for rate in rates:
        learning_rate = at_rate("delora", rate).train
        for bound in bounds:
            settings.append(Setting(label_of(rate), bound, "delora", learning_rate | {"relative_bound": bound}))
    return [*settings, BASE]


def label_of(rate: float) -> str:
    return f"{figures.multiple(rate)}x the default rate"


def run(options: argparse.Namespace) -> None:
    """Run all bounds; write the rows, the figure, the caption, the knees and an image per setting."""
    path = options.output_dir / options.name
    rates = {label_of(rate): rate for rate in options.multipliers or RATES}

    def write_all(rows: pd.DataFrame, trials: Sequence[Trial]) -> Path:
        rows.insert(0, "model", base_model_name(options))
        rows.insert(3, "rate_multiplier", rows["label"].map(rates))
        rows["relative_distance"] = relative_distances(rows, trials)
        write_rows(path.with_suffix(".parquet"), rows)
        caption = write(path, rows, captions.unfinished(trials, rows, unit=""))
        trained = [trial for trial in trials if trial.setting.x is not None]
        captions.write_images(path, "relative bound", trained, "{:g}".format)
        return caption

    run_study(options, settings_of(options), write_all)


def relative_distances(rows: pd.DataFrame, trials: Sequence[Trial]) -> list[float | None]:
    """The relative distance that each row's training reached; see ``relative_distance``."""
    by_setting = {(trial.setting.label, trial.setting.x): trial.plan for trial in trials if trial.setting.x is not None}
    distances = []
    for label, x, seed, subject in rows[["label", "x", "seed", "subject"]].itertuples(index=False):
        plan = by_setting.get((label, x))
        if plan is None or kept_step(plan) is not None:
            distances.append(None)
        else:
            file = plan.folder / f"seed-{seed}" / str(subject) / "adapter" / WEIGHTS_NAME
            distances.append(relative_distance(file) if file.is_file() else None)
    return distances


def relative_distance(file: Path) -> float | None:
    """The mean of ``|W' - W|_F / |W|_F`` over the matrices of a DeLoRA adapter.

    With the column scale the file has the norm of each column of W, and so ``|W|_F``; None with another scale.
    """
    tensors = load_file(file)
    ratios = []
    for key in (key for key in tensors if key.endswith(".delora_lambda")):
        of_matrix = {n: tensors.get(f"{key.removesuffix('lambda')}{n}") for n in ("A", "B", "A0", "B0", "w_norm")}
        a, b, columns = (of_matrix[name] for name in ("A", "B", "w_norm"))
        if a is None or b is None or columns is None or columns.ndim != 1:
            return None
        factors = [(a, b)] if of_matrix["A0"] is None else [(a, b), (of_matrix["A0"], of_matrix["B0"])]
        terms = []
        for rows, columns_of_b in factors:
            assert rows is not None and columns_of_b is not None
            rows, columns_of_b = rows.astype(np.float64), columns_of_b.astype(np.float64)
            unit_rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-4)
            unit_columns = columns_of_b / np.linalg.norm(columns_of_b, axis=0, keepdims=True).clip(1e-4)
            terms.append((unit_columns, unit_rows * columns))
        left = np.concatenate([term[0] * sign for term, sign in zip(terms, (1, -1))], axis=1)
        right = np.concatenate([term[1] for term in terms])
        squared = ((left.T @ left) * (right @ right.T)).sum()  # |left right|^2, a trace of thin products
        scale = float(tensors[key]) / len(a)
        ratios.append(abs(scale) * np.sqrt(max(squared, 0.0)) / np.linalg.norm(columns))
    return float(np.mean(ratios)) if ratios else None


def crossing(bounds: np.ndarray, margins: np.ndarray) -> np.ndarray:
    """The bound up to which a curve stays at or above zero, (n,), by linear interpolation over the logarithm of bounds.

    The first bound if the curve begins below zero; the last if it never falls below.

    Args:
        bounds: (k,), increasing. margins: n curves, (n, k); bounds at which a curve is NaN are passed over.
    """
    crossings = np.empty(len(margins))
    for i, curve in enumerate(margins):
        known = ~np.isnan(curve)
        positions, values = np.log(bounds[known]), curve[known]
        below = np.flatnonzero(values < 0)
        if not len(below):
            position = positions[-1]
        elif below[0] == 0:
            position = positions[0]
        else:
            k = below[0]
            position = np.interp(0, [values[k], values[k - 1]], [positions[k], positions[k - 1]])
        crossings[i] = np.exp(position)
    return crossings


def knees(rows: pd.DataFrame) -> dict[str, Interval]:
    """The two bounds of ``KNEES`` by score, each with its 95% bootstrap interval over subjects.

    Args:
        rows: of one base model and protocol; of several learning rates, the means over them count. Those of the base
            model itself have the method ``none``.
    """
    trained = cast(pd.DataFrame, rows[rows["method"] != "none"])
    base: Any = rows[rows["method"] == "none"]
    tables = {score: by_setting(trained, ["x"], score) for score in KNEES}
    subjects = tables["clip_t"].columns
    of_base = base.groupby("subject")["clip_t"].mean().reindex(subjects).to_numpy(float)
    bounds = tables["clip_t"].index.get_level_values("x").to_numpy(float)
    weights = np.vstack([np.ones(len(subjects)), resampled(len(subjects))])
    # The base model is compared on the same subjects, so its scores are subtracted before the means are taken.
    lost = subject_means(tables["clip_t"].to_numpy(float) - of_base, weights)
    dino = subject_means(tables["dino"].to_numpy(float), weights)
    missing = DINO_SHARE * np.nanmax(dino, axis=1, keepdims=True) - dino
    crossings = {"clip_t": crossing(bounds, lost + CLIP_T_LOSS), "dino": crossing(bounds, missing)}
    return {score: (float(values[0]), *percentiles(values[1:])) for score, values in crossings.items()}


def write(path: Path, rows: pd.DataFrame, missing: str) -> Path:
    """The figure, its caption with all numbers, and the knees: ``path`` with .png, .svg, .md and .json.

    Args:
        missing: see ``captions.unfinished``.
    """
    model = rows["model"].iloc[0]
    rows = captions.first_protocol(rows)
    base, trained = captions.where(rows, "method", "none"), cast(pd.DataFrame, rows[rows["method"] != "none"])
    table = captions.tabulate(trained)
    means: Any = trained.groupby(["label", "x"])["relative_distance"].mean()
    table["relative_distance"] = [means[label, x] for label, x in zip(table["label"], table["x"])]
    of_base = {name: mean_and_interval(base, name) for name, _ in captions.PAIRED_SCORES}
    heights = {name: float("nan") if interval is None else interval["mean"] for name, interval in of_base.items()}
    real = mean_and_interval(rows, "real_dino")
    figures.plot_bounds(table, heights, None if real is None else real["mean"], path)
    cells, by_rate = [], {}
    groups = [(label, group) for label, group in trained.groupby("label", sort=False)]
    for label, group in [*groups, *([("mean over rates", trained)] if len(groups) > 1 else [])]:
        by_rate[str(label)] = {} if base.empty else knees(pd.concat([cast(pd.DataFrame, group), base]))
        measured = sorted(group["x"].unique())
        texts = {score: knee_text(interval, measured) for score, interval in by_rate[str(label)].items()}
        cells.append([str(label), *(texts.get(score, "") for score in KNEES)])
    header, lines = captions.means(table, "relative bound")
    relative = ["" if pd.isna(value) else f"{value:.3g}" for value in table["relative_distance"]]
    seeds, subjects = rows["seed"].nunique(), rows["subject"].nunique()
    parts = [
        f"![{SHOWS}]({path.name}.png)\n",
        f"{SHOWS}\n",
        f"Base model {model}: DINO {heights['dino']:.3f}, CLIP-T {heights['clip_t']:.3f}. {subjects} subjects, {seeds}"
        f" seeds.\nIn brackets: 95% bootstrap interval over subjects; ±: standard deviation over seeds.{missing}\n",
        markdown([*header, "relative distance"], [[*line, cell] for line, cell in zip(lines, relative)]),
        "Knees, interpolated over the logarithm of the bound:\n",
        *(f"- {meaning}." for meaning in KNEES.values()),
        "",
        markdown(["", "CLIP-T", "DINO"], cells),
    ]
    write_text(path.with_suffix(".json"), json.dumps({"model": model, "base": heights, "knees": by_rate}, indent=1))
    file = path.with_suffix(".md")
    write_text(file, "\n".join(parts))
    return file


def knee_text(interval: Interval, bounds: list[float]) -> str:
    """``0.152 [0.121, 0.190]``; at the ends of the bounds that were measured with a sign that it lies outside."""
    value, low, high = interval
    sign = "≤ " if np.isclose(value, bounds[0]) else "≥ " if np.isclose(value, bounds[-1]) else ""
    return f"{sign}{value:.3f} [{low:.3f}, {high:.3f}]"
