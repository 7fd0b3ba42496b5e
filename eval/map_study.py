"""The rows from LoRA and from ETHER+ to DeLoRA on semantic maps (the paper's table 2): train, draw, score, a table.

Every row and seed is trained on the same pairs, draws a picture for each map that no training saw, and is scored by a
segmentation model; what is there and whole is kept, so the same command continues.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.maps import find_pairs
from eval import benchmark, running, study
from eval.plan import check_base_model, pairs
from eval.studies import Setting, ablation
from eval.writing import write_text, written_whole

TRAINING_SCRIPT = running.ROOT / "train_controlnet_map2img.py"
PAIRS, TEST_MAPS = 4000, 200
"""Of toybox, rendered where no folders are named."""
SCORES = {"miou": "mIoU", "mean_accuracy": "mAcc", "pixel_accuracy": "aAcc", "frechet": "Frechet distance"}
SHOWS = "From LoRA to DeLoRA and from ETHER+ to DeLoRA on semantic maps, row by row (the paper's table 2)."
SHOWN = 5
"""Maps in the sheet of pictures."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One row and seed: ``place`` gets the adapter, the pictures, ``scores.json``."""

    setting: Setting
    seed: int
    place: Path

    @property
    def scores(self) -> Path:
        return self.place / "scores.json"

    def is_done(self) -> bool:
        return self.scores.is_file()


def run(options: argparse.Namespace) -> None:
    settings = ablation(options.methods, ())
    study.refuse_what_is_varied(options, settings)
    if options.seeds < 1 or options.jobs < 1:
        raise InputError(f"--seeds is {options.seeds} and --jobs {options.jobs}; give at least 1 of each.")
    check_base_model(options.pretrained_model_name_or_path)
    data_dir, map_dir = folders(options)
    find_pairs(data_dir)
    pictures = {Path(str(pair.map)).stem: pair.picture for pair in find_pairs(map_dir)}
    accelerator = benchmark.start()
    folder = options.output_dir / "runs"
    runs = [Run(s, seed, folder / f"maps-{s.slug}" / f"seed-{seed}") for s in settings for seed in range(options.seeds)]
    with study.alone(accelerator, options.output_dir):
        if accelerator.is_main_process:
            remember(options, data_dir, map_dir)
        waiting = [task(one, options, data_dir, map_dir) for one in runs if not one.is_done()]
        failed = running.run_on_all(accelerator, waiting, options.jobs)
        if accelerator.is_main_process:
            rows = gather(runs, failed)
            path = options.output_dir / "ablation-maps"
            with written_whole(path.with_suffix(".parquet")) as temporary:
                rows.to_parquet(temporary, index=False)
            caption = write(path, rows, runs)
            write_pictures(path.with_name("ablation-maps-pictures"), runs, pictures)
            study.finish(caption, failed)


def folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """The pairs to train on and those whose maps are drawn, named or rendered.

    Raises:
        InputError
    """
    named = (options.train_data_dir, options.map_dir)
    if all(named):
        return named
    if any(named) or options.pretrained_model_name_or_path is not None:
        raise InputError("ablation-maps wants --train_data_dir and --map_dir, both or, for the miniature, neither.")
    from data.toybox.__main__ import write_map_pairs  # imports torch

    found = options.output_dir / "map-pairs", options.output_dir / "test-maps"
    write_map_pairs(found[0], PAIRS, seed=5)
    write_map_pairs(found[1], TEST_MAPS, seed=6, unseen=True)
    return found


def remember(options: argparse.Namespace, data_dir: Path, map_dir: Path) -> None:
    """Write down what the runs depend on.

    Raises:
        InputError: the folder holds runs that were made otherwise.
    """
    file = options.output_dir / "runs" / "maps-settings.json"
    made: dict[str, Any] = {"train_data_dir": str(data_dir.resolve()), "map_dir": str(map_dir.resolve())}
    made["pretrained_model_name_or_path"] = options.pretrained_model_name_or_path
    made |= {flag: pairs(getattr(options, flag), f"--{flag}") for flag in ("train", "generate", "score")}
    before = json.loads(file.read_text()) if file.is_file() else made
    for name, value in made.items():
        if before[name] != value:
            raise InputError(
                f"{options.output_dir} has runs made with {name} {json.dumps(before[name])}, not {json.dumps(value)}; "
                "name another --output_dir."
            )
    write_text(file, json.dumps(made, indent=2) + "\n")


def task(one: Run, options: argparse.Namespace, data_dir: Path, map_dir: Path) -> running.Task:
    """Train, draw, score."""
    adapter, drawn, python = one.place / "adapter", one.place / "pictures", sys.executable
    training = {"checkpoints_total_limit": 1, "report_to": "tensorboard", "resume_from_checkpoint": "latest"}
    training |= {"pretrained_model_name_or_path": options.pretrained_model_name_or_path, "train_data_dir": data_dir}
    training |= {"cache_dir": options.output_dir / "cache", "method": one.setting.method, "seed": one.seed}
    training |= {**one.setting.train, **pairs(options.train, "--train"), "output_dir": adapter}
    drawing = {"map_dir": map_dir, "seed": one.seed, **pairs(options.generate, "--generate")}
    drawing |= {"adapter": adapter, "output_dir": drawn}
    protocol = "toybox" if options.pretrained_model_name_or_path is None else "ade20k"
    scoring = {"protocol": protocol, "map_dir": map_dir, **pairs(options.score, "--score")}
    scoring |= {"generated_dir": drawn, "output": one.scores}

    def score() -> Sequence[str]:
        one.scores.with_suffix(".png").unlink(missing_ok=True)  # a sheet alone is of a scoring that was stopped
        return [python, "-m", "eval", "map2img", *running.flags(scoring)]

    steps = [
        running.Step(
            lambda: [python, str(TRAINING_SCRIPT), *running.flags(training)],
            (adapter / running.WEIGHTS_NAME).is_file,
        ),
        running.Step(
            lambda: [python, "-m", "delora_diffusers", "generate", *running.flags(drawing)],
            lambda: running.pictures_are_whole(drawn, ()),
        ),
        running.Step(score, one.is_done),
    ]
    return running.Task(one.place, [one], steps)


def gather(runs: Sequence[Run], failed: dict[str, str]) -> Any:
    """A row for each setting and seed: scores, those of the real pictures, the training's last distance.

    Raises:
        InputError: there is none; tells the first problem of ``failed``.
    """
    import pandas as pd

    found = []
    for one in runs:
        if one.is_done():
            scored = json.loads(one.scores.read_text())
            row: dict[str, Any] = {"label": one.setting.label, "method": one.setting.method, "seed": one.seed}
            row |= scored["scores"] | {f"real_{name}": value for name, value in (scored["real"] or {}).items()}
            found.append(row | {"distance": study.last_distance(one.place / "adapter")})
    if not found:
        raise InputError(f"no row came to its end; the first problem: {next(iter(failed.values()), 'none')}")
    return pd.DataFrame(found)


def write(path: Path, rows: Any, runs: Sequence[Run]) -> Path:
    """The figure and the table, ``path`` with .png, .svg and .md."""
    import pandas as pd

    from eval import figures

    seeds = len({one.seed for one in runs})
    missing = [f"{one.setting.label}, seed {one.seed}" for one in runs if not one.is_done()]
    lines = [f"![{SHOWS}]({path.name}.png)", "", SHOWS, ""]
    lines += [f"{seeds} seeds; ± the standard deviation between them, in the figure the lowest and the highest."]
    lines += [f"Did not end, and in no mean: {'; '.join(missing)}."] if missing else []
    lines += ["", f"| | {' | '.join(SCORES.values())} | distance |", f"| --- |{' ---: |' * (len(SCORES) + 1)}"]
    table = []
    for label, of in rows.groupby("label", sort=False):
        row, cells = {"label": label}, [str(label)]
        for name in SCORES:
            values = of[name].dropna()
            spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}" if len(values) else "")
            row |= {name: values.mean(), f"{name}_low": values.min(), f"{name}_high": values.max()}
        lines.append(f"| {' | '.join(cells)} | {of['distance'].mean():.3g} |")
        table.append(row)
    real = [rows[f"real_{name}"].mean() if f"real_{name}" in rows else None for name in SCORES]
    shown = " | ".join("" if value is None else f"{value:.3f}" for value in real)
    lines.append(f"| real pictures | {shown} | |")
    axes = [("miou", "mIoU"), ("frechet", "Frechet distance to the real pictures")]
    figures.rows_of_a_table(pd.DataFrame(table), real[0], path, axes)
    file = path.with_suffix(".md")
    write_text(file, "\n".join(lines) + "\n")
    return file


def write_pictures(path: Path, runs: Sequence[Run], real: dict[str, Any]) -> None:
    """The pictures of the first maps by every row, first seed, below the real ones of the scenes."""
    from eval import figures

    rows: dict[str, dict[str, Path]] = {}
    columns = list(real)[:SHOWN]
    beside = {name: real[name] for name in columns if isinstance(real[name], Path)}
    if beside:
        rows["real"] = beside
    for one in runs:
        if one.seed == 0 and one.is_done():
            lines = (one.place / "pictures" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            drawn = {Path(record["map"]).stem: record["file_name"] for record in map(json.loads, lines)}
            rows[one.setting.label] = {name: one.place / "pictures" / drawn[name] for name in columns if name in drawn}
    figures.picture_rows(rows, columns, None, "", path)
