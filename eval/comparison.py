"""Every method at the best of a few rates, found on some subjects and scored on the others (the paper's table 3).

The rate with the highest DINO on the first three subjects is taken, of the usual one times 1/2, 1 and 2; the other
subjects are trained at it with every seed.
"""

import argparse
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import load_benchmark
from data.errors import InputError
from eval import benchmark, captions, figures, study
from eval.methods import LEARNING_RATES, TITLES
from eval.results import mean_and_interval
from eval.studies import Setting, Trial
from eval.writing import write_text, written_whole

SHOWS = "Every method at its best rate (the paper's table 3)."
METHODS = ("lora", "dora", "etherplus", "oft", "full", "delora")
FACTORS = (0.5, 1.0, 2.0)
TUNED_ON = 3
"""Subjects."""
FIXED = ("A0", "B0", "w_norm")
"""The last part of the names of tensors that an adapter keeps and does not train."""


def settings_of(method: str, factors: Sequence[float]) -> list[Setting]:
    return [Setting(TITLES[method], f, method, {"learning_rate": LEARNING_RATES[method] * f}) for f in factors]


def run(options: argparse.Namespace) -> None:
    subjects = options.subjects or [subject.name for subject in load_benchmark(options.benchmark).subjects]
    if len(subjects) <= TUNED_ON:
        raise InputError(
            f"comparison tunes on {TUNED_ON} subjects and scores the others; {len(subjects)} are too few, name more."
        )
    methods, factors = options.methods or METHODS, options.places or FACTORS
    accelerator = benchmark.start()
    tuning = copy.copy(options)
    tuning.subjects, tuning.seeds = subjects[:TUNED_ON], 1
    settings = [setting for method in methods for setting in settings_of(method, factors)]
    trials = study.plan(tuning, settings)
    with study.alone(accelerator, options.output_dir):
        failed = study.make(accelerator, options, trials)
        chosen = [None]
        if accelerator.is_main_process:
            grid = study.gather(trials, failed)
            with written_whole(options.output_dir / "comparison-grid.parquet") as temporary:
                grid.to_parquet(temporary, index=False)
            chosen = [best_factors(grid)]
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(chosen)
        assert chosen[0] is not None
        tuned: dict[str, float] = chosen[0]
        options.subjects = subjects[TUNED_ON:]
        settings = [
            setting for method in methods if method in tuned for setting in settings_of(method, [tuned[method]])
        ]
        final = study.plan(options, settings)
        failed |= study.make(accelerator, options, final)
        if accelerator.is_main_process:
            rows = study.gather(final, failed)
            with written_whole(options.output_dir / "comparison.parquet") as temporary:
                rows.to_parquet(temporary, index=False)
            path = options.output_dir / "comparison"
            never = [TITLES[method] for method in methods if method not in tuned]
            missing = captions.ended(final, rows) + (f" Ended at no rate: {', '.join(never)}." if never else "")
            written = write(path, rows, counts(final), subjects[:TUNED_ON], missing)
            captions.write_pictures(path.with_name("comparison-pictures"), None, as_rows(final))
            study.finish(written, failed)


def best_factors(rows: Any) -> dict[str, float]:
    """By method, the factor of the rate whose DINO is highest on average."""
    rows = rows[rows["protocol"] == rows["protocol"].iloc[0]]
    means = rows.groupby(["method", "x"])["dino"].mean().reset_index()
    best = means.loc[means.groupby("method")["dino"].idxmax()]
    return dict(zip(best["method"], best["x"]))


def as_rows(trials: Sequence[Trial]) -> list[Trial]:
    """The settings as rows of a table: at which rate each stands is no axis."""
    return [(dataclasses.replace(setting, x=None), plan, options) for setting, plan, options in trials]


def counts(trials: Sequence[Trial]) -> dict[str, int]:
    """By method, how many parameters are trained."""
    found = {}
    for setting, one, _ in trials:
        files = sorted(one.folder.glob("seed-*/*/adapter/*.safetensors"))
        if files:
            found[setting.method] = trained_parameters(files[0], setting.method)
    return found


def trained_parameters(file: Path, method: str) -> int:
    """How many numbers of an adapter file were trained, by its header."""
    from safetensors import safe_open

    fixed = (*FIXED, "magnitude") if method == "dora_fixed_magnitude" else FIXED
    total = 0
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118
            if not name.endswith(fixed):
                size = 1
                for side in opened.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def write(path: Path, rows: Any, parameters: dict[str, int], tuned_on: Sequence[str], missing: str) -> Path:
    """The figure and the table, ``path`` with .png, .svg and .md; ``missing`` is of ``captions.ended``."""
    rows = rows[rows["protocol"] == rows["protocol"].iloc[0]]
    seeds = rows["seed"].nunique()
    of_real: Any = mean_and_interval(rows, "real_dino")
    figures.rows_of_a_table(captions.tabulate(rows), of_real["mean"], path)
    lines = [
        f"![{SHOWS}]({path.name}.png)",
        "",
        SHOWS,
        "",
        f"Rates chosen by DINO on {', '.join(tuned_on)}; scored on {rows['subject'].nunique()} other subjects, {seeds}",
        "seeds. In brackets the bootstrap 95% interval over subjects, ± the standard deviation between seeds."
        + missing,
        "",
        "| | parameters | rate | DINO | CLIP-I | CLIP-T |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (label, method, x), of in rows.groupby(["label", "method", "x"], sort=False):
        cells = [label, f"{parameters[method]:,}", f"{LEARNING_RATES[method] * x:g}"]
        for name in ("dino", "clip_i", "clip_t"):
            found: Any = mean_and_interval(of, name)
            means = of.groupby("seed")[name].mean()
            spread = f" ± {means.std():.3f}" if seeds > 1 else ""
            cells.append(f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    real = {name: mean_and_interval(rows, name) for name in ("real_dino", "real_clip_i")}
    shown = [f"{found['mean']:.3f}" if found else "" for found in real.values()]
    lines.append(f"| photographs with one another | | | {' | '.join(shown)} | |")
    lines += captions.against_the_last(rows)
    file = path.with_suffix(".md")
    write_text(file, "\n".join(lines) + "\n")
    return file
