"""Every method at the best of a few rates, chosen on some subjects, scored on all of them (the paper's table 3).

The rate is 0.5x, 1x or 2x the default, whichever gives the highest DINO on the first three subjects with the first
seed. Then all subjects are trained at that rate with every seed, as in the paper, including those three. With a single
multiplier nothing is tuned.
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

from delora_diffusers.atomic import write_text
from delora_diffusers.methods.table import METHODS
from delora_diffusers.wording import counted
from eval.benchmark.checks import chosen_benchmark
from eval.benchmark.recipes import SUBJECTS
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
KEYS = ["label", "method", "x"]
REAL = {"real_dino": "DINO", "real_clip_i": "CLIP-I"}
"""Columns of the real images' scores, and the columns of the table that show them."""
FIXED = ("A0", "B0", "w_norm")
"""Suffixes of the tensors that an adapter stores but does not train."""


def settings_of(method: str, multipliers: Sequence[float]) -> list[Setting]:
    """A method at each multiple of its default rate."""
    return [at_rate(method, multiplier) for multiplier in multipliers]


def run(options: argparse.Namespace) -> None:
    """Tune, train and score; write the grid, the rows, the figure, the caption and an image per method."""
    subjects = [subject.name for subject in chosen_benchmark(options).subjects]
    recipe = SUBJECTS[options.recipe].multipliers if options.recipe else None
    methods, multipliers = options.methods or COMPARED, options.multipliers or recipe or MULTIPLIERS
    path = options.output_dir / "comparison"
    tuning = copy.copy(options)
    tuning.subjects, tuning.seeds = subjects[:TUNING_SUBJECTS], 1
    trials = plan_trials(tuning, [setting for method in methods for setting in settings_of(method, multipliers)])
    accelerator = start_accelerator()
    with exclusive(accelerator, options.output_dir):
        failed, chosen, tuned_on = {}, [dict.fromkeys(methods, multipliers[0])], []
        if len(multipliers) > 1:
            failed, tuned_on = run_trials(accelerator, options, trials), tuning.subjects
            if accelerator.is_main_process:
                grid = gather(trials, failed)
                write_rows(path.with_name("comparison-grid.parquet"), grid)
                chosen = [best_multipliers(grid)]
            broadcast_object_list(chosen)
        tuned = {method: chosen[0][method] for method in methods if method in chosen[0]}
        final = plan_trials(options, [s for method in tuned for s in settings_of(method, [tuned[method]])])
        failed |= run_trials(accelerator, options, final)
        if accelerator.is_main_process:
            rows = gather(final, failed)
            write_rows(path.with_suffix(".parquet"), rows)
            unfinished = [METHODS[method].title for method in methods if method not in tuned]
            missing = captions.unfinished(final, rows)
            missing += f" Did not finish at any rate: {', '.join(unfinished)}." if unfinished else ""
            caption = write(path, rows, parameter_counts(final), tuned_on, missing)
            captions.write_images(path, None, as_rows(final))
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
        tuned_on: the subjects on which the rates were chosen; empty if they were not.
        missing: see ``captions.unfinished``.
    """
    rows = captions.first_protocol(rows)
    figures.plot_rows(captions.tabulate(rows), interval_of(rows, "real_dino")["mean"], path)
    table = [table_row(cast(tuple, key), group, parameters, tuned_on) for key, group in rows.groupby(KEYS, sort=False)]
    real = {name: f"{interval_of(rows, column)['mean']:.3f}" for column, name in REAL.items()}
    header = list(table[0])
    cells = [list(row.values()) for row in table]
    cells.append(["real images (intra-subject)", *(real.get(name, "") for name in header[1:])])
    tuning = "The learning rates were not tuned."
    if tuned_on:
        tuning = f"The learning rates were chosen by DINO on {', '.join(tuned_on)} with one seed."
    parts = [
        f"![{SHOWS}]({path.name}.png)\n",
        f"{SHOWS}\n",
        f"{tuning} All {counted(rows['subject'].nunique(), 'subject')} are scored, with "
        f"{counted(rows['seed'].nunique(), 'seed')}.\n"
        f"In brackets: 95% bootstrap interval over subjects; ±: standard deviation over seeds.{missing}\n",
        markdown(header, cells),
        *captions.against_the_last(rows),
    ]
    file = path.with_suffix(".md")
    write_text(file, "\n".join(parts))
    return file


def table_row(
    key: tuple[str, str, float], rows: pd.DataFrame, parameters: dict[str, int], tuned_on: Sequence[str]
) -> dict[str, str]:
    """The cells of one method by column.

    Args:
        key: label, method and multiple of the default rate.
        rows: of the method, one per subject and seed.
    """
    label, method, x = key
    cells = {"": label, "parameters": f"{parameters[method]:,}", "rate": f"{METHODS[method].learning_rate * x:g}"}
    if "step" in rows:
        cells["steps"] = f"{rows['step'].iloc[0]:g}"
    for name, title in (("dino", "DINO"), ("clip_i", "CLIP-I"), ("clip_t", "CLIP-T")):
        means: Any = rows.groupby("seed")[name].mean()
        interval = interval_of(rows, name)
        spread = f" ± {means.std():.3f}" if len(means) > 1 else ""
        cells[title] = f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]{spread}"
    others = cast(pd.DataFrame, rows[~rows["subject"].isin(tuned_on)])
    if tuned_on and len(others):
        cells["DINO without those"] = f"{interval_of(others, 'dino')['mean']:.3f}"
    return cells


def interval_of(rows: pd.DataFrame, name: str) -> dict[str, Any]:
    """The mean of a score that every row has, and its interval."""
    interval = mean_and_interval(rows, name)
    assert interval is not None
    return interval
