"""Every method at the best of a few rates, chosen on some subjects, scored on the others (the paper's table 3).

The rate is 0.5x, 1x or 2x the default, whichever gives the highest DINO on the first three subjects. The other
subjects are trained at that rate with every seed.
"""

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
from accelerate.utils import broadcast_object_list
from safetensors import safe_open

from data.benchmark import load_benchmark
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from eval.benchmark.results import mean_and_interval
from eval.benchmark.run import start_accelerator
from eval.benchmark.tables import markdown
from eval.study import captions, figures
from eval.study.settings import Setting, at_rate
from eval.study.trials import Trial, exclusive, finish, gather, plan_trials, run_trials, write_rows

SHOWS = "Every method at its best rate (the paper's table 3)."
COMPARED = ("lora", "dora", "etherplus", "oft", "full", "delora")
MULTIPLIERS = (0.5, 1.0, 2.0)
TUNING_SUBJECTS = 3
FIXED = ("A0", "B0", "w_norm")
"""Suffixes of the tensors that an adapter stores but does not train."""


def settings_of(method: str, multipliers: Sequence[float]) -> list[Setting]:
    """A method at each multiple of its default rate."""
    return [at_rate(method, multiplier) for multiplier in multipliers]


def run(options: argparse.Namespace) -> None:
    """Tune, train and score; write the grid, the rows, the figure, the caption and an image per method."""
    subjects = options.subjects or [subject.name for subject in load_benchmark(options.benchmark).subjects]
    if len(subjects) <= TUNING_SUBJECTS:
        raise InputError(
            f"comparison tunes on {TUNING_SUBJECTS} subjects and scores the others, but there are only "
            f"{len(subjects)}; add some."
        )
    methods, multipliers = options.methods or COMPARED, options.multipliers or MULTIPLIERS
    path = options.output_dir / "comparison"
    accelerator = start_accelerator()
    tuning = copy.copy(options)
    tuning.subjects, tuning.seeds = subjects[:TUNING_SUBJECTS], 1
    trials = plan_trials(tuning, [setting for method in methods for setting in settings_of(method, multipliers)])
    with exclusive(accelerator, options.output_dir):
        failed = run_trials(accelerator, options, trials)
        chosen: list[dict[str, float]] = [{}]
        if accelerator.is_main_process:
            grid = gather(trials, failed)
            write_rows(path.with_name("comparison-grid.parquet"), grid)
            chosen = [best_multipliers(grid)]
        broadcast_object_list(chosen)
        tuned = {method: chosen[0][method] for method in methods if method in chosen[0]}
        options = argparse.Namespace(**vars(options) | {"subjects": subjects[TUNING_SUBJECTS:]})
        final = plan_trials(options, [s for method in tuned for s in settings_of(method, [tuned[method]])])
        failed |= run_trials(accelerator, options, final)
        if accelerator.is_main_process:
            rows = gather(final, failed)
            write_rows(path.with_suffix(".parquet"), rows)
            unfinished = [METHODS[method].title for method in methods if method not in tuned]
            missing = captions.unfinished(final, rows)
            missing += f" Did not finish at any rate: {', '.join(unfinished)}." if unfinished else ""
            caption = write(path, rows, parameter_counts(final), subjects[:TUNING_SUBJECTS], missing)
            captions.write_images(path.with_name("comparison-pictures"), None, as_rows(final))
            finish(caption, failed)


def best_multipliers(rows: pd.DataFrame) -> dict[str, float]:
    """By method, the multiple of the default rate with the highest mean DINO."""
    rows = captions.first_protocol(rows)
    means = rows.groupby(["method", "x"])["dino"].mean().reset_index()
    best = means.loc[means.groupby("method")["dino"].idxmax()]
    return dict(zip(best["method"], best["x"]))


def as_rows(trials: Sequence[Trial]) -> list[Trial]:
    """The trials as rows of a table, in which the rate is not an axis."""
    return [dataclasses.replace(trial, setting=dataclasses.replace(trial.setting, x=None)) for trial in trials]


def parameter_counts(trials: Sequence[Trial]) -> dict[str, int]:
    """By method, the number of trained parameters."""
    counts = {}
    for trial in trials:
        files = sorted(trial.plan.folder.glob("seed-*/*/adapter/*.safetensors"))
        if files:
            counts[trial.setting.method] = trained_parameters(files[0], trial.setting.method)
    return counts


def trained_parameters(file: Path, method: str) -> int:
    """The number of trained parameters in an adapter file, from its header."""
    fixed = (*FIXED, "magnitude") if method == "dora_fixed_magnitude" else FIXED
    total = 0
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118
            if not name.endswith(fixed):
                size = 1
                for dimension in opened.get_slice(name).get_shape():
                    size *= dimension
                total += size
    return total


def write(path: Path, rows: pd.DataFrame, parameters: dict[str, int], tuned_on: Sequence[str], missing: str) -> Path:
    """The figure and the table: ``path`` with .png, .svg and .md.

    Args:
        missing: see ``captions.unfinished``.
    """
    rows = captions.first_protocol(rows)
    seeds = rows["seed"].nunique()
    real_dino: Any = mean_and_interval(rows, "real_dino")
    figures.plot_rows(captions.tabulate(rows), real_dino["mean"], path)
    table = []
    for key, group in rows.groupby(["label", "method", "x"], sort=False):
        label, method, x = cast(tuple, key)
        cells = [str(label), f"{parameters[method]:,}", f"{METHODS[method].learning_rate * x:g}"]
        for name in ("dino", "clip_i", "clip_t"):
            interval: Any = mean_and_interval(group, name)
            means = group.groupby("seed")[name].mean()
            spread = f" ± {means.std():.3f}" if seeds > 1 else ""
            cells.append(f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]{spread}")
        table.append(cells)
    real = [mean_and_interval(rows, name) for name in ("real_dino", "real_clip_i")]
    shown = [f"{interval['mean']:.3f}" if interval else "" for interval in real]
    table.append(["real images (intra-subject)", "", "", *shown, ""])
    parts = [
        f"![{SHOWS}]({path.name}.png)\n",
        f"{SHOWS}\n",
        f"Rates were chosen by DINO on {', '.join(tuned_on)}; scored on {rows['subject'].nunique()} other subjects,\n"
        f"{seeds} seeds. In brackets: 95% bootstrap interval over subjects; ±: standard deviation over seeds."
        f"{missing}\n",
        markdown(["", "parameters", "rate", "DINO", "CLIP-I", "CLIP-T"], table),
        *captions.against_the_last(rows),
    ]
    file = path.with_suffix(".md")
    write_text(file, "\n".join(parts))
    return file
