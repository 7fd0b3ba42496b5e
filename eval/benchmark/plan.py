"""Plan a benchmark run: find its photos, decide its folders, and record its settings."""

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, Subject, find_subjects, render_subjects
from data.photographs import find_photographs
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.names import is_folder_name
from delora_diffusers.text_files import read_json
from eval.benchmark.checks import chosen_benchmark, is_toybox, total_steps
from eval.benchmark.recipes import flag_values, training_flags
from eval.benchmark.tasks import (
    ROOT,
    images_folder,
)

PACKAGES = ("accelerate", "diffusers", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: which subjects, with which photos and settings, in which folders.

    Attributes:
        photographs: by subject. settings: everything that the images depend on.
        class_images: folder with a folder of class images for each class; None without prior preservation.
        continues: the same run with fewer training steps, from whose checkpoints this one continues.
    """

    benchmark: Benchmark
    folder: Path
    photographs: dict[str, list[Path]]
    settings: dict[str, Any]
    class_images: Path | None = None
    continues: "Plan | None" = None

    @property
    def seeds(self) -> range:
        return range(self.settings["seeds"])

    def subject_folder(self, subject: Subject, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / subject.name

    @property
    def steps(self) -> list[int | None]:
        """The training steps whose images are scored; None is the finished run."""
        every = self.settings.get("score_every")
        if not every or self.settings["method"] == "none":
            return [None]
        return [*range(every, total_steps(self.settings), every), None]

    def images_folder(self, subject: Subject, seed: int, step: int | None) -> Path:
        return images_folder(self.subject_folder(subject, seed), step)

    def class_folder(self, subject: Subject) -> Path:
        """The folder of the subject's class images."""
        assert self.class_images is not None
        name = subject.class_name
        if not is_folder_name(name):
            name = f"class-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return self.class_images / name

    def base_folder(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / ".base"

    def measures_drift(self) -> bool:
        """Whether the run also generates images without the subject and compares them with the base model's."""
        return self.settings["method"] != "none" and bool(self.benchmark.drift_prompts)


def make_plan(options: argparse.Namespace) -> Plan:
    """Find the photos (those of toys are rendered) and set up the run.

    Args:
        options: checked, and completed by ``with_defaults``.

    Raises:
        InputError: photos are missing or unreadable.
    """
    benchmark = chosen_benchmark(options)
    if options.photographs == options.output_dir / "photographs" and is_toybox(benchmark):
        render_subjects(benchmark, options.photographs)
    missing = find_subjects(benchmark, options.photographs).missing
    if missing:
        raise InputError(
            f"{options.photographs} has no photos of {', '.join(missing)}; add them, or choose other subjects with "
            "--subjects."
        )
    photographs = {}
    for subject in benchmark.subjects:
        folder = options.photographs / subject.name
        photographs[subject.name] = [photo.path for photo in find_photographs(folder)]
        if len(photographs[subject.name]) < 2:
            raise InputError(f"{folder} has only one photo; real images are scored in pairs, so add another.")
    settings = {
        "benchmark": dataclasses.asdict(dataclasses.replace(benchmark, subjects=())),
        "photographs": {name: _content(paths) for name, paths in photographs.items()},
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "method": options.method,
        "train": training_flags(options, options.method),
        "generate": flag_values(options.generate, "--generate"),
        "seeds": options.seeds,
    }
    if options.score_every is not None:
        settings["score_every"] = options.score_every
    if options.generated_dir is not None:
        settings |= {"generated_dir": str(options.generated_dir), "method": "none"}
    prior = settings["method"] != "none" and settings["train"].get("with_prior_preservation")
    return Plan(benchmark, options.output_dir, photographs, settings, options.class_images if prior else None)


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_settings(plan: Plan, options: argparse.Namespace) -> None:
    """Record the settings, and the package versions and the commit of this start of the run.

    With the same settings, or with more subjects or seeds, the run continues.

    Raises:
        InputError: the folder contains a run with other settings, or something else.
    """
    file = plan.folder / "settings.json"
    settings = json.loads(json.dumps(plan.settings))
    starts: list[Any] = []
    if file.is_file():
        recorded = read_json(file)
        if not isinstance(recorded, dict) or not {"made", "starts"} <= recorded.keys():
            raise InputError(f"{file} is damaged; restore it, or give a new --output_dir.")
        starts = recorded["starts"]
        for name, value in settings.items():
            old = recorded["made"].get(name)
            if name == "photographs":
                changed = [subject for subject in value if old.get(subject, value[subject]) != value[subject]]
                if changed:
                    raise InputError(
                        f"{plan.folder} was created with other photos of {changed[0]}; give another --output_dir."
                    )
                settings[name] = old | value
            elif name != "seeds" and old != value:
                raise InputError(
                    f"{plan.folder} was created with {name} {json.dumps(old)}, not {json.dumps(value)}; give another "
                    "--output_dir."
                )
    elif plan.folder.is_dir() and any(path.name != "photographs" for path in plan.folder.iterdir()):
        raise InputError(f"--output_dir {plan.folder} already contains something else; give a new folder.")
    scored = ("protocol", "dino", "clip", "lpips", "precision", "keep_best_by")
    scoring = {name: getattr(options, name) for name in scored}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    starts.append({"started": now, "git_commit": git_commit(), "versions": versions(), "command": sys.argv[1:]})
    write_text(file, json.dumps({"made": settings, "scored": scoring, "starts": starts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The current commit, with ``-dirty`` if files were changed; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
