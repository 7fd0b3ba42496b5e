"""From LoRA and from ETHER+ to DeLoRA on semantic maps, row by row (the paper's table 2).

Every row and seed is trained on the same pairs, generates an image for each held-out map, and is scored by a
segmentation model. Whatever is already complete is kept, so the same command continues a run that was stopped.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from data.maps import find_pairs
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.json_lines import GENERATED_FROM_MAPS, read_json_lines
from delora_diffusers.names import METADATA_NAME, WEIGHTS_NAME
from delora_diffusers.text_files import read_json
from delora_diffusers.wording import counted
from eval.benchmark.checks import check_base_model
from eval.benchmark.recipes import MAPS, training_flags, with_recipe
from eval.benchmark.run import run_on_all, start_accelerator
from eval.benchmark.tables import markdown
from eval.benchmark.tasks import ROOT, Step, Task, flag_values, flags, images_are_complete
from eval.study import figures
from eval.study.settings import Setting, ablation
from eval.study.trials import check_not_varied, distance_of, exclusive, finish, write_rows

TRAINING_SCRIPT = ROOT / "train_controlnet_map2img.py"
PAIRS, TEST_MAPS = 4000, 200
"""How many toybox renders if no folders are given."""
SCORES = {"miou": "mIoU", "mean_accuracy": "mAcc", "pixel_accuracy": "aAcc", "frechet": "Frechet distance"}
SHOWS = "From LoRA to DeLoRA and from ETHER+ to DeLoRA on semantic maps, row by row (the paper's table 2)."
SHOWN_MAPS = 5
"""Number of maps in the sheet of images."""


@dataclasses.dataclass(frozen=True)
class MapRun:
    """One row and seed. The adapter, the images and ``scores.json`` go to ``folder``."""

    setting: Setting
    seed: int
    folder: Path

    @property
    def scores(self) -> Path:
        return self.folder / "scores.json"

    @property
    def images(self) -> Path:
        return self.folder / "pictures"

    def is_done(self) -> bool:
        return self.scores.is_file()


@dataclasses.dataclass(frozen=True)
class MapCommands:
    """The commands of one row and seed."""

    run: MapRun
    options: argparse.Namespace
    data_dir: Path
    map_dir: Path

    @property
    def adapter(self) -> Path:
        return self.run.folder / "adapter"

    def train(self) -> Sequence[str]:
        options, setting = self.options, self.run.setting
        training = {"checkpoints_total_limit": 1, "report_to": "tensorboard", "resume_from_checkpoint": "latest"}
        training |= {"pretrained_model_name_or_path": options.pretrained_model_name_or_path, "square": True}
        training |= {"train_data_dir": self.data_dir, "cache_dir": options.output_dir / "cache"}
        training |= {"method": setting.method, "seed": self.run.seed, **setting.train}
        training |= {**training_flags(options, setting.method, MAPS), "output_dir": self.adapter}
        return [sys.executable, str(TRAINING_SCRIPT), *flags(training)]

    def generate(self) -> Sequence[str]:
        generation = {"map_dir": self.map_dir, "seed": self.run.seed}
        generation |= {**flag_values(self.options.generate, "--generate")}
        generation |= {"adapter": self.adapter, "output_dir": self.run.images}
        return [sys.executable, "-m", "delora_diffusers", "generate", *flags(generation)]

    def score(self) -> Sequence[str]:
        self.run.scores.with_suffix(".png").unlink(missing_ok=True)  # a sheet without scores: the scoring was stopped
        protocol = "toybox" if self.options.pretrained_model_name_or_path is None else "ade20k"
        scoring = {"protocol": protocol, "map_dir": self.map_dir, **flag_values(self.options.score, "--score")}
        scoring |= {"generated_dir": self.run.images, "output": self.run.scores}
        return [sys.executable, "-m", "eval", "map2img", *flags(scoring)]

    def task(self) -> Task:
        """Train, generate, score."""
        steps = [
            Step(self.train, (self.adapter / WEIGHTS_NAME).is_file),
            Step(self.generate, lambda: images_are_complete(self.run.images, ())),
            Step(self.score, self.run.is_done),
        ]
        return Task(self.run.folder, [self.run], steps)


def run(options: argparse.Namespace) -> None:
    """Run every row and seed; write the rows, the figure, the table and a sheet of images."""
    options = with_recipe(options, MAPS)
    settings = ablation(options.methods, (), maps=True)
    check_not_varied(options, settings)
    if options.seeds < 1 or options.jobs < 1:
        raise InputError(f"--seeds is {options.seeds} and --jobs {options.jobs}; give at least 1 for each.")
    check_base_model(options.pretrained_model_name_or_path)
    check_data_flags(options)
    accelerator = start_accelerator()
    with accelerator.main_process_first():  # the others find what the first has rendered
        data_dir, map_dir = data_folders(options)
    find_pairs(data_dir)
    real_images = {Path(str(pair.map)).stem: pair.image for pair in find_pairs(map_dir)}
    folder, path = options.output_dir / "runs", options.output_dir / "ablation-maps"
    seeds = range(options.seeds)
    runs = [MapRun(s, seed, folder / f"maps-{s.slug}" / f"seed-{seed}") for s in settings for seed in seeds]
    with exclusive(accelerator, options.output_dir):
        if accelerator.is_main_process:
            record_settings(options, data_dir, map_dir)
        tasks = [MapCommands(r, options, data_dir, map_dir).task() for r in runs if not r.is_done()]
        failed = run_on_all(accelerator, tasks, options.jobs)
        if accelerator.is_main_process:
            rows = gather(runs, failed)
            write_rows(path.with_suffix(".parquet"), rows)
            caption = write(path, rows, runs)
            write_images(path.with_name(f"{path.name}-images"), runs, real_images)
            finish(caption, failed)


def check_data_flags(options: argparse.Namespace) -> None:
    """Reject missing or unusable folders of pairs and maps.

    Raises:
        InputError: only one of the two folders is given, or none for another model; or one has no pairs.
    """
    given = [folder for folder in (options.train_data_dir, options.map_dir) if folder is not None]
    if len(given) == 1 or (not given and options.pretrained_model_name_or_path is not None):
        raise InputError(
            "ablation-maps needs both --train_data_dir and --map_dir; only for the miniature can both be left out."
        )
    for folder in given:
        find_pairs(folder)


def data_folders(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of pairs to train on and of maps to generate from; for the miniature they can be rendered."""
    if options.train_data_dir is not None:
        return options.train_data_dir, options.map_dir
    from data.toybox.write import write_map_pairs  # imports torch

    rendered = options.output_dir / "map-pairs", options.output_dir / "test-maps"
    write_map_pairs(rendered[0], PAIRS, seed=5)
    write_map_pairs(rendered[1], TEST_MAPS, seed=6, unseen=True)
    return rendered


def record_settings(options: argparse.Namespace, data_dir: Path, map_dir: Path) -> None:
    """Record everything that the runs depend on.

    Raises:
        InputError: the folder contains runs with other settings.
    """
    file = options.output_dir / "runs" / "maps-settings.json"
    settings: dict[str, Any] = {"train_data_dir": str(data_dir.resolve()), "map_dir": str(map_dir.resolve())}
    settings["pretrained_model_name_or_path"] = options.pretrained_model_name_or_path
    settings |= {flag: flag_values(getattr(options, flag), f"--{flag}") for flag in ("train", "generate", "score")}
    recorded = read_json(file) if file.is_file() else settings
    for name, value in settings.items():
        if recorded[name] != value:
            raise InputError(
                f"{options.output_dir} has runs with {name} {json.dumps(recorded[name])}, not {json.dumps(value)}; "
                "give another --output_dir."
            )
    write_text(file, json.dumps(settings, indent=2) + "\n")


def gather(runs: Sequence[MapRun], failed: dict[str, str]) -> pd.DataFrame:
    """A row per setting and seed: scores, scores of the real images, distance at the end of training.

    Raises:
        InputError: nothing was scored; gives the first problem of ``failed``.
    """
    rows = []
    for run in runs:
        if run.is_done():
            result = read_json(run.scores)
            row: dict[str, Any] = {"label": run.setting.label, "method": run.setting.method, "seed": run.seed}
            row |= result["scores"] | {f"real_{name}": value for name, value in (result["real"] or {}).items()}
            rows.append(row | {"distance": distance_of(run.folder / "adapter")})
    if not rows:
        raise InputError(f"no row finished; the first problem: {next(iter(failed.values()), 'none')}")
    return pd.DataFrame(rows)


def write(path: Path, rows: pd.DataFrame, runs: Sequence[MapRun]) -> Path:
    """The figure and the table: ``path`` with .png, .svg and .md."""
    seeds = len({run.seed for run in runs})
    unfinished = [f"{run.setting.label}, seed {run.seed}" for run in runs if not run.is_done()]
    table, cells = [], []
    for label, group in rows.groupby("label", sort=False):
        row: dict[str, Any] = {"label": label}
        texts = [str(label)]
        for name in SCORES:
            values = group[name].dropna()
            spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
            texts.append(f"{values.mean():.3f}{spread}" if len(values) else "")
            row |= {name: values.mean(), f"{name}_low": values.min(), f"{name}_high": values.max()}
        cells.append([*texts, f"{group['distance'].mean():.3g}"])
        table.append(row)
    real = [rows[f"real_{name}"].mean() if f"real_{name}" in rows else None for name in SCORES]
    cells.append(["real images", *("" if value is None else f"{value:.3f}" for value in real), ""])
    axes = [("miou", "mIoU"), ("frechet", "Frechet distance to the real images")]
    figures.plot_rows(pd.DataFrame(table), real[0], path, axes)
    counts = (
        f"{counted(seeds, 'seed')}. ±: standard deviation over seeds; the figure shows the lowest and the highest.\n"
    )
    counts += f"Not finished, and excluded from all means: {'; '.join(unfinished)}.\n" if unfinished else ""
    parts = [f"![{SHOWS}]({path.name}.png)\n", f"{SHOWS}\n", counts]
    file = path.with_suffix(".md")
    write_text(file, "\n".join([*parts, markdown(["", *SCORES.values(), "distance"], cells)]))
    return file


def write_images(path: Path, runs: Sequence[MapRun], real: dict[str, Any]) -> None:
    """A grid with the images of the first maps: the real images, then those of every row at the first seed."""
    rows: dict[str, dict[str, Path]] = {}
    columns = list(real)[:SHOWN_MAPS]
    files = {name: real[name] for name in columns if isinstance(real[name], Path)}
    if files:
        rows["real"] = files
    for run in runs:
        if run.seed == 0 and run.is_done():
            records = read_json_lines(run.images / METADATA_NAME, GENERATED_FROM_MAPS)
            by_map = {Path(record["map"]).stem: run.images / record["file_name"] for _, record in records}
            rows[run.setting.label] = {name: by_map[name] for name in columns if name in by_map}
    figures.plot_images(rows, columns, None, "", path)
