"""Subject and prompt fidelity against the time that training takes, over batch sizes, learning rates and step counts.

    python -m benchmarks.time_to_quality OUT [--train FLAG=VALUE ...] [--batch_sizes 1 2 4 8] [--rates 1 2 4]
        [--steps 25 50 ...] [--workers 12] [--pretrained_model_name_or_path MODEL]

Trains DeLoRA and LoRA on ten toys that the miniature never saw; the toys of a setting train together.
Quality is DINO where CLIP-T is 0.01 below the base model's, see ``benchmarks.strength_dial``. These runs share one GPU,
or are spread over those that are visible. The time of a step is measured before, in a process of its own for each
method and batch size, with one toy and the GPU idle otherwise: the median between CUDA events. Seconds are steps times
that; start-up, which is everything else from the start of the process to the saved adapter, is reported separately.
Without a GPU the clock replaces the events.

Writes ``table.md``, ``table.json``, and ``time_to_quality.png`` and ``.svg`` to OUT. Finished runs are kept, so the
same command continues after an interruption.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import pandas as pd

from benchmarks.miniature_runs import flags, prepare, run_all, toy_number, train
from benchmarks.reporting import print_and_save
from benchmarks.strength_dial import (
    CHOOSING,
    CLIP_T_LOSS,
    Toys,
    as_rows,
    at_equal_clip_t,
    difference,
    run_toys,
    subject_prompt,
    write_photos,
)
from delora_diffusers.atomic import atomic_write, write_text
from delora_diffusers.dispatch import exit_on_bad_input
from delora_diffusers.errors import InputError
from delora_diffusers.methods.table import METHODS
from delora_diffusers.outputs import check_writable
from delora_diffusers.training.arguments import positive_int
from delora_diffusers.wording import counted
from eval.benchmark.tables import markdown
from eval.benchmark.tasks import flag_values

BATCH_SIZES = (1, 2, 4, 8)
RATES = (1.0, 2.0, 4.0)
STEPS = (25, 50, 100, 200, 300, 600, 1000)
DEFAULT = (4, 1.0, 300)
"""Batch size, multiple of the default rate and steps of the setting that others are compared with."""
DINO_LOSS = 0.01
"""What the DINO of a setting that counts as equally good may lose."""
OF_DELORA = ("relative_bound", "delora_lambda", "lambda_learning_rate")
"""Flags in ``--train`` that other methods do not have; they are left out for those."""
VARIED = ("method", "train_batch_size", "learning_rate", "max_train_steps", "output_dir", "subjects_file", "seed")
TIMED_STEPS, SKIPPED = 150, 30
"""Steps of a timing run, and how many of them are not timed: graphs are recorded, and clocks settle."""
BASE = "none"
"""The method of the base model's own images."""


SETTING = ("method", "batch_size", "rate", "steps")
"""The columns that tell settings apart."""


class Run(NamedTuple):
    """A setting to train all toys with, or the base model.

    Attributes:
        folder: of this run. photos: with a folder for each toy. rate: multiple of the method's default rate.
        train: flags of the training script that all runs of the method share. model: None for the miniature.
    """

    folder: Path
    photos: Path
    method: str
    batch_size: int
    rate: float
    steps: int
    subjects: tuple[int, ...]
    seed: int
    train: dict[str, Any]
    model: str | None


def training_flags(run: Run, **more: Any) -> dict[str, Any]:
    """The flags of the training script for a run, without those of its toys and its output."""
    shared = {name: value for name, value in run.train.items() if run.method == "delora" or name not in OF_DELORA}
    values: dict[str, Any] = {"resolution": 128, "square": True} | shared
    values |= {"method": run.method, "train_batch_size": run.batch_size, "max_train_steps": run.steps}
    values |= {"learning_rate": METHODS[run.method].learning_rate * run.rate, "seed": run.seed}
    if run.model is not None:
        values["pretrained_model_name_or_path"] = run.model
    return {name: value for name, value in (values | more).items() if value is not False}


def toys_of(run: Run) -> Toys:
    train = None if run.method == BASE else training_flags(run)
    return Toys(run.folder, run.photos, run.subjects, run.seed, train, model=run.model)


def time_training(run: Run) -> dict[str, Any]:
    """Milliseconds of a step of a training with one toy, the median, and the seconds of everything else.

    Runs in a new process, whose imports count as start-up.
    """
    file = run.folder / "timing.json"
    if file.exists():
        return json.loads(file.read_text())
    import psutil
    import torch

    from delora_diffusers.training import loop

    prepare(run.folder, "training")
    on_gpu = torch.cuda.is_available()
    marks: list[Any] = []

    class Timed(loop.LossMonitor):
        """Marks the end of every backward, between which lie the optimizer and the next batch."""

        def add(self, losses: torch.Tensor, step: int) -> None:
            super().add(losses, step)
            marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
            if on_gpu:
                marks[-1].record()

    (number,) = run.subjects
    of_toy = {
        "output_dir": run.folder / "training",
        "instance_data_dir": run.photos / f"{number:03}",
        "instance_prompt": subject_prompt(number),
    }
    with patch.object(loop, "LossMonitor", Timed):
        train(training_flags(run, **of_toy))
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.time() - psutil.Process().create_time()
    pairs = list(itertools.pairwise(marks))[min(SKIPPED, len(marks) // 2) :]
    times = [before.elapsed_time(after) if on_gpu else 1000 * (after - before) for before, after in pairs]
    step = statistics.median(times)
    result = {"method": run.method, "batch_size": run.batch_size, "ms": step}
    result |= {"start_up": seconds - run.steps * step / 1000, "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name() if on_gpu else "CPU"
    write_text(file, json.dumps(result) + "\n")
    return result


def all_runs(options: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """The runs that time training, and those that measure quality, the longest first."""
    shared = flag_values(options.train, "--train")
    clash = next((name for name in VARIED if name in shared), None)
    if clash is not None:
        raise InputError(f"--train {clash} is what this benchmark sets itself; leave it out.")
    model, photos = options.pretrained_model_name_or_path, options.out_dir / "photos"
    settings = {(b, r, s) for b in options.batch_sizes for r in options.rates for s in options.steps} | {DEFAULT}
    subjects = tuple(options.subjects)
    common = {"photos": photos, "train": shared, "model": model}
    timings = [
        Run(options.out_dir / "timing" / f"{m}-batch-{b}", method=m, batch_size=b, rate=1.0, steps=options.timed_steps,
            subjects=subjects[:1], seed=0, **common)
        for m in options.methods for b in sorted({batch for batch, _, _ in settings})
    ]  # fmt: skip
    longest_first = sorted(settings, key=lambda setting: setting[0] * setting[2], reverse=True)
    qualities = [
        Run(options.out_dir / "runs" / f"{m}-batch-{b}-rate-{r:g}-steps-{s}-seed-{seed}", method=m, batch_size=b,
            rate=r, steps=s, subjects=subjects, seed=seed, **common)
        for b, r, s in longest_first for m in options.methods for seed in range(options.seeds)
    ]  # fmt: skip
    bases = [
        Run(options.out_dir / "runs" / f"{BASE}-seed-{seed}", method=BASE, batch_size=0, rate=0.0, steps=0,
            subjects=subjects, seed=seed, **common)
        for seed in range(options.seeds)
    ]  # fmt: skip
    return timings, [*qualities, *bases]


def check_settings(options: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Reject flags that the training script does not have, and a folder whose runs had other flags.

    Raises:
        InputError
    """
    import train_dreambooth_delora

    for run in runs:
        train_dreambooth_delora.parse_arguments(flags(training_flags(run, output_dir=run.folder)))
    file = options.out_dir / "settings.json"
    settings = {"train": runs[0].train, "model": runs[0].model, "subjects": list(options.subjects)}
    text = json.dumps(settings, indent=1, default=str) + "\n"
    if file.exists() and file.read_text() != text:
        raise InputError(f"{options.out_dir} has runs with other flags, see settings.json in it; give another folder.")
    options.out_dir.mkdir(parents=True, exist_ok=True)
    write_text(file, text)


def summarize(rows: pd.DataFrame, timings: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row per trained setting: seconds, its quality, and how much that differs from its method's default and from
    DeLoRA's, with the 95% interval over subjects and seeds.

    Args:
        rows: one per setting, subject, seed and strength. timings: of ``time_training``.
    """
    clock = {(t["method"], t["batch_size"]): t for t in timings}
    base = pd.DataFrame(rows[rows["method"] == BASE])
    groups = rows[rows["method"] != BASE].groupby(list(SETTING))
    values = {key: at_equal_clip_t(pd.DataFrame(group), base) for key, group in groups}
    table = []
    for key, group in groups:
        method, batch_size, rate, steps = cast(tuple[str, int, float, int], key)
        timing, full = clock.get((method, batch_size)), group[group["strength"] == 1]
        row: dict[str, Any] = dict(zip(SETTING, (method, batch_size, rate, steps)))
        row |= {"quality": values[key][0], "dino": full["dino"].mean(), "clip_t": full["clip_t"].mean()}
        row["seconds"] = float("nan") if timing is None else steps * timing["ms"] / 1000
        row["start_up"] = float("nan") if timing is None else timing["start_up"]
        for reference in dict.fromkeys((method, "delora")):
            if (reference, *DEFAULT) in values:
                change, low, high = difference(values[key], values[(reference, *DEFAULT)])
                row |= {f"vs_{reference}": change, f"vs_{reference}_low": low, f"vs_{reference}_high": high}
        table.append(row)
    return pd.DataFrame(table)


def fastest(table: pd.DataFrame, method: str, reference: str) -> dict[str, Any] | None:
    """The setting of a method that takes the least time among those whose quality is at most ``DINO_LOSS`` below that
    of the reference's default; None if there is none."""
    of_method = pd.DataFrame(table[table["method"] == method])
    if f"vs_{reference}" not in of_method:
        return None
    candidates = of_method[(of_method[f"vs_{reference}"] >= -DINO_LOSS) & of_method["seconds"].notna()]
    return None if candidates.empty else candidates.loc[candidates["seconds"].idxmin()].to_dict()


def report(table: pd.DataFrame, rows: pd.DataFrame, timings: Sequence[dict[str, Any]], failed: Sequence[str]) -> str:
    """All tables as Markdown."""
    base = rows[rows["method"] == BASE]
    header = ["", "as good as the default of", "batch", "rate", "steps", "seconds", "start-up, s"]
    header += ["DINO at equal CLIP-T", "DINO at strength 1", "CLIP-T at strength 1"]
    cells = []
    for method in dict.fromkeys(table["method"]):
        for reference in dict.fromkeys((method, "delora")):
            best = fastest(table, method, reference)
            titles = [METHODS[method].title, METHODS[reference].title]
            if best is None:
                cells.append([*titles, "none", *[""] * (len(header) - 3)])
            else:
                cells.append([*titles, *setting_cells(best), f"{best['start_up']:.1f}", *score_cells(best)])
    seeds, subjects = rows["seed"].nunique(), rows["subject"].nunique()
    parts = [
        f"Base model: DINO {base['dino'].mean():.3f}, CLIP-T {base['clip_t'].mean():.3f}. "
        f"{counted(subjects, 'toy')}, {counted(seeds, 'seed')}. Rate: multiple of the method's default. The default "
        f"setting: batch {DEFAULT[0]}, rate {DEFAULT[1]:g}, {DEFAULT[2]} steps.\n",
        f"Equal CLIP-T: {CLIP_T_LOSS} below the base model's. The fastest setting whose DINO there is at most "
        f"{DINO_LOSS}\nbelow that of the default:\n",
        markdown(header, cells, left=2),
        "Time of a step, one toy, an otherwise idle device:\n",
        markdown(
            ["", "batch", "ms per step", "start-up, s"],
            [
                [METHODS[t["method"]].title, str(t["batch_size"]), f"{t['ms']:.2f}", f"{t['start_up']:.1f}"]
                for t in timings
            ],
        ),
        "All settings, by time:\n",
    ]
    lines = []
    for row in table.sort_values(by=["method", "seconds"]).to_dict("records"):
        against = f"vs_{row['method']}"
        known = against in row and not pd.isna(row[against])
        change = f"{row[against]:+.3f} [{row[against + '_low']:+.3f}, {row[against + '_high']:+.3f}]" if known else ""
        lines.append([METHODS[row["method"]].title, *setting_cells(row), *score_cells(row), change])
    columns = ["", *header[2:6], *header[7:], "DINO at equal CLIP-T minus the default's"]
    parts.append(markdown(columns, lines))
    if timings:
        parts.append(f"{timings[0]['device']}, torch {timings[0]['torch']}.")
    if failed:
        parts.append(f"Failed, see the errors printed by the command: {', '.join(failed)}.")
    return "\n".join(parts)


def setting_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row['batch_size']:g}", f"{row['rate']:g}x", f"{row['steps']:g}", f"{row['seconds']:.1f}"]


def score_cells(row: dict[str, Any]) -> list[str]:
    return [f"{row[name]:.3f}" for name in ("quality", "dino", "clip_t")]


def plot(table: pd.DataFrame, rows: pd.DataFrame, path: Path) -> None:
    """Quality over seconds, a marker for each batch size, with its number of steps; the line is the best so far."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, panel = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    marker_of = dict(zip(sorted(set(table["batch_size"])), itertools.cycle("osD^vP")))
    handles = []
    for method, colour in zip(dict.fromkeys(table["method"]), ("#00798c", "#d1495b", "#edae49", "#66a182")):
        points = pd.DataFrame(table[(table["method"] == method) & table["seconds"].notna()]).sort_values(by="seconds")
        for seconds, quality, batch_size, steps in points[["seconds", "quality", "batch_size", "steps"]].to_numpy():
            panel.plot(seconds, quality, marker_of[batch_size], color=colour, markersize=5, markeredgewidth=0)
            panel.annotate(
                f"{steps:g}", (seconds, quality), (4, 3), textcoords="offset points", fontsize=7, color="#555"
            )
        panel.step(points["seconds"], points["quality"].cummax(), where="post", color=colour)
        handles.append(Line2D([], [], color=colour, label=METHODS[method].title))
    for batch_size, marker in marker_of.items():
        handles.append(Line2D([], [], linestyle="", color="#555", marker=marker, label=f"batch {batch_size:g}"))
    base = rows[rows["method"] == BASE]["dino"].mean()
    panel.set_title(f"base model: DINO {base:.3f}; numbers at points: steps", fontsize=9, color="#555", loc="right")
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel("seconds of training (start-up not included)")
    panel.set_ylabel("DINO at equal CLIP-T")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(handles=handles, frameon=False)
    for suffix in (".png", ".svg"):
        with atomic_write(path.with_suffix(suffix)) as temporary:
            figure.savefig(temporary, format=suffix[1:], dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--methods", nargs="+", choices=[m for m in METHODS if m != "full"], default=["delora", "lora"])
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="multiples of the default rate")
    parser.add_argument("--steps", type=positive_int, nargs="+", default=STEPS)
    parser.add_argument(
        "--train", nargs="+", default=[], metavar="FLAG=VALUE", help="flags of the training script for every run"
    )
    parser.add_argument("--pretrained_model_name_or_path", help="default: the miniature")
    parser.add_argument("--subjects", type=toy_number, nargs="+", default=CHOOSING, help="numbers of unseen subjects")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--timed_steps", type=positive_int, default=TIMED_STEPS)
    parser.add_argument("--workers", type=positive_int, default=12, help="runs at the same time; default: 12")
    options = parser.parse_args(argv)
    wrong = next((rate for rate in options.rates if not 0 < rate < float("inf")), None)
    if wrong is not None:
        raise InputError(f"--rates {wrong:g} is not positive; give positive numbers, 1 for the default.")
    check_writable(options.out_dir / "runs", "OUT")
    timing_runs, runs = all_runs(options)
    check_settings(options, timing_runs)
    write_photos(options.out_dir / "photos", options.subjects)
    timings: list[Any] = list(run_all(time_training, timing_runs, workers=1, per_process=1))
    results, settings = [], {run.folder.name: run for run in runs}
    for result in run_all(run_toys, [toys_of(run) for run in runs], options.workers):
        results.append(result)
        print(f"{result['folder']}: finished, {len(results)} of {len(runs)}", flush=True)
    failed = sorted(settings.keys() - {result["folder"] for result in results})
    rows = as_rows(results)
    if rows.empty or not (rows["name"] == BASE).any() or (rows["name"] == BASE).all():
        raise InputError("no setting finished, or the base model did not; see the errors above.")
    first = {run.folder.name.rsplit("-seed-", 1)[0]: run for run in runs}
    for name in SETTING:
        rows[name] = [getattr(first[folder], name) for folder in rows["name"]]
    timings.sort(key=lambda t: (options.methods.index(t["method"]), t["batch_size"]))
    table = summarize(rows, timings)
    text = {"settings": table.to_dict("records"), "timings": timings, "rows": rows.to_dict("records")}
    write_text(options.out_dir / "table.json", json.dumps(text, indent=1, default=float) + "\n")
    plot(table, rows, options.out_dir / "time_to_quality")
    print_and_save(report(table, rows, timings, failed), options.out_dir / "table.md")


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
