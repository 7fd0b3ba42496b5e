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
from data.photographs import NO_MASKS, find_photographs
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.image_files import list_images
from delora_diffusers.names import is_folder_name
from delora_diffusers.text_files import read_json
from eval.benchmark.checks import chosen_benchmark, is_toybox, number_of_class_images, total_steps
from eval.benchmark.recipes import training_flags
from eval.benchmark.tasks import ROOT, flag_values, images_folder

PACKAGES = ("accelerate", "diffusers", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: which subjects, with which photos and settings, in which folders.

    Attributes:
        photographs: by subject. settings: everything that the images depend on.
        class_images: folder with a folder of class images for each class; None without prior preservation.
        gives_class_images: whether the user gave that folder; its images are used as they are.
        continues: the same run with fewer training steps, from whose checkpoints this one continues.
        base_run: the run whose images of the base model the drift is measured against; None if this run has its own.
        strengths: further strengths at which images are generated.
    """

    benchmark: Benchmark
    folder: Path
    photographs: dict[str, list[Path]]
    settings: dict[str, Any]
    class_images: Path | None = None
    gives_class_images: bool = False
    continues: "Plan | None" = None
    base_run: Path | None = None
    strengths: tuple[float, ...] = ()

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

    def images_folder(self, subject: Subject, seed: int, step: int | None, strength: float = 1.0) -> Path:
        return images_folder(self.subject_folder(subject, seed), step, strength)

    def class_folder(self, subject: Subject) -> Path:
        """The folder of the subject's class images. Images of other settings are in another folder."""
        assert self.class_images is not None
        name = subject.class_name
        if not is_folder_name(name):
            name = f"class-{_digest(name.encode())}"
        if self.gives_class_images:
            return self.class_images / name
        settings = json.dumps(self.class_generation(), sort_keys=True, default=str)
        return self.class_images / _digest(settings.encode()) / name

    def class_generation(self) -> dict[str, object]:
        """The flags of ``generate`` for class images."""
        train, generate = self.settings["train"], self.settings["generate"]
        return {
            "pretrained_model_name_or_path": self.settings["pretrained_model_name_or_path"],
            "revision": train.get("revision"),
            "variant": train.get("variant"),
            "num_images": number_of_class_images(train),
            "resolution": train.get("resolution"),
            "mixed_precision": train.get("mixed_precision"),
            "num_inference_steps": train.get("validation_inference_steps"),
            "batch_size": train.get("sample_batch_size", generate.get("batch_size")),
        }

    def base_folder(self, seed: int) -> Path:
        return (self.base_run or self.folder) / f"seed-{seed}" / ".base"

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
        photographs[subject.name] = [photo.path for photo in find_photographs(folder, NO_MASKS)]
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
    if options.score_every:
        settings["score_every"] = options.score_every
    if options.generated_dir is not None:
        settings |= {"generated_dir": str(options.generated_dir), "method": "none"}
    prior = settings["method"] != "none" and settings["train"].get("with_prior_preservation")
    class_images = (options.class_images or options.shared_class_images) if prior else None
    plan = Plan(benchmark, options.output_dir, photographs, settings, class_images, options.class_images is not None)
    if plan.gives_class_images:
        check_class_images(plan)
    return plan


def check_class_images(plan: Plan) -> None:
    """Reject a folder of class images that lacks images of a class.

    Raises:
        InputError
    """
    wanted = number_of_class_images(plan.settings["train"])
    for subject in plan.benchmark.subjects if plan.class_images is not None else ():
        folder = plan.class_folder(subject)
        count = len(list_images(folder)) if folder.is_dir() else 0
        if count < wanted:
            raise InputError(
                f"{folder} has {count} class images instead of {wanted}; add images, or lower num_class_images."
            )


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


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
        for name in {**recorded["made"], **settings}:
            old, value = recorded["made"].get(name), settings.get(name)
            if name == "photographs":
                changed = [subject for subject in value if old.get(subject, value[subject]) != value[subject]]
                if changed:
                    raise InputError(
                        f"{plan.folder} was created with other photos of {changed[0]}; give another --output_dir."
                    )
                settings[name] = old | value
            elif name != "seeds" and old != value:
                raise InputError(
                    f"{plan.folder} was created {_difference(name, old, value)}; give another --output_dir."
                )
    elif plan.folder.is_dir() and any(path.name != "photographs" for path in plan.folder.iterdir()):
        raise InputError(f"--output_dir {plan.folder} already contains something else; give a new folder.")
    scored = ("protocol", "dino", "clip", "lpips", "precision", "keep_best_by")
    scoring = {name: getattr(options, name) for name in scored}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    starts.append({"started": now, "git_commit": git_commit(), "versions": versions(), "command": sys.argv[1:]})
    write_text(file, json.dumps({"made": settings, "scored": scoring, "starts": starts}, indent=2) + "\n")


def _difference(name: str, old: Any, new: Any) -> str:
    """``with rank "4", not "8"``; of two dictionaries only the first entry that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return _difference(f"{name} {key}", old.get(key), new.get(key))
    before, now = (json.dumps(value)[:80] for value in (old, new))
    if old is None:
        return f"without {name}, not with {now}"
    return f"with {name} {before}, not {'without' if new is None else now}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The current commit, with ``-dirty`` if files were changed; None outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
