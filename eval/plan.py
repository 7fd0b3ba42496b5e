"""What a benchmark run is to make: checked before anything is made, recorded, and cut into tasks."""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, Subject, find_subjects, load_benchmark, render_subjects
from data.errors import InputError
from data.photographs import find_photographs
from eval import norms, running
from eval.writing import write_text

PACKAGES = ("accelerate", "diffusers", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")


def pairs(typed: Sequence[str], flag: str) -> dict[str, object]:
    """``rank=16 center_crop`` as flags and values.

    Raises:
        InputError: something that is no FLAG=VALUE.
    """
    found: dict[str, object] = {}
    for word in typed:
        name, equals, value = word.lstrip("-").partition("=")
        if not name.isidentifier():
            raise InputError(f"{flag} {word} is not FLAG=VALUE; write for example {flag} seed=1.")
        found[name] = value if equals else True
    return found


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: which subjects, whose photographs, what is made, in which folders.

    Attributes:
        photographs: by subject. made: the settings that the pictures depend on.
        continues: the same with fewer training steps, whose trainings this one goes on with.
    """

    benchmark: Benchmark
    folder: Path
    photographs: dict[str, list[Path]]
    made: dict[str, Any]
    continues: "Plan | None" = None

    @property
    def seeds(self) -> range:
        return range(self.made["seeds"])

    def place(self, subject: Subject, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / subject.name

    def base(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / ".base"

    def drifts(self) -> bool:
        """Whether pictures without the subject are drawn and compared."""
        return self.made["method"] != "none" and bool(self.benchmark.drift_prompts)


def check(options: argparse.Namespace) -> Plan:
    """Refuse bad input before anything is made; render the toys, if they are the subjects.

    Raises:
        InputError
    """
    benchmark = load_benchmark(options.benchmark)
    for flag in ("seeds", "jobs", "together", "batch_size"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.subjects:
        known = {subject.name for subject in benchmark.subjects}
        unknown = [name for name in options.subjects if name not in known]
        if unknown:
            raise InputError(f"--subjects {unknown[0]}: {benchmark.name} has {', '.join(sorted(known))}.")
        kept = tuple(subject for subject in benchmark.subjects if subject.name in options.subjects)
        benchmark = dataclasses.replace(benchmark, subjects=kept)
    toys = all(subject.toybox is not None for subject in benchmark.subjects)
    if options.photographs is None and not toys:
        raise InputError(f"{benchmark.name} has no photographs of its own; name their folder with --photographs.")
    if options.pretrained_model_name_or_path is None and not toys and options.generated_dir is None:
        raise InputError(f"{benchmark.name} needs a base model; name it with --pretrained_model_name_or_path.")
    if options.photographs is None:
        options.photographs = options.output_dir / "photographs"
        render_subjects(benchmark, options.photographs)
    options.protocol = options.protocol or (["toybox"] if toys else ["delora"])
    options.lpips = options.lpips or ("none" if options.protocol == ["toybox"] else "alex")
    found = find_subjects(benchmark, options.photographs)
    if found.missing:
        raise InputError(
            f"{options.photographs} holds no photographs of {', '.join(found.missing)}; add them, or name the others "
            "with --subjects."
        )
    photographs = {}
    for subject in benchmark.subjects:
        folder = options.photographs / subject.name
        photographs[subject.name] = [photograph.path for photograph in find_photographs(folder)]
        if len(photographs[subject.name]) < 2:
            raise InputError(f"{folder} holds one photograph; real images are scored in pairs, so add another.")
    if options.generated_dir is None:
        if not running.TRAINING_SCRIPT.is_file():
            raise InputError(f"{running.TRAINING_SCRIPT} is missing; run benchmarks from a clone of the repository.")
        check_base_model(options.pretrained_model_name_or_path)
    made = {
        "benchmark": dataclasses.asdict(dataclasses.replace(benchmark, subjects=())),
        "photographs": {name: _content(paths) for name, paths in photographs.items()},
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "method": options.method,
        "train": pairs(options.train, "--train"),
        "generate": pairs(options.generate, "--generate"),
        "seeds": options.seeds,
    }
    if options.generated_dir is not None:
        check_generated(options, benchmark)
        made |= {"generated_dir": str(options.generated_dir), "method": "none"}
    return Plan(benchmark, options.output_dir, photographs, made)


@functools.cache
def check_base_model(name_or_path: str | None) -> None:
    """Refuse a model that every training would fail to load: of a hub's, its index is downloaded.

    Raises:
        InputError
    """
    if name_or_path in (None, norms.MINIATURE.name) or (Path(name_or_path) / "model_index.json").is_file():
        return
    folder = Path(name_or_path)
    if folder.exists() or folder.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
        raise InputError(
            f"--pretrained_model_name_or_path {name_or_path} has no model_index.json; name a whole pipeline folder, "
            "as pipeline.save_pretrained writes it, or a hub id."
        )
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name_or_path, "model_index.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--pretrained_model_name_or_path {name_or_path} is no pipeline folder and could not be had from the hub "
            f"({reason}); name another, or download it first."
        ) from error


def check_generated(options: argparse.Namespace, benchmark: Benchmark) -> None:
    """Refuse pictures that cannot be those of the benchmark.

    Raises:
        InputError: no such folder, a folder that is no subject's, flags that would make pictures.
    """
    given: Path = options.generated_dir
    if options.train or options.generate or options.seeds != 1:
        raise InputError("--generated_dir scores what is there; leave out --train, --generate and --seeds.")
    if not given.is_dir():
        raise InputError(f"--generated_dir {given} is not a folder; name one that holds a folder for each subject.")
    names = {subject.name for subject in benchmark.subjects}
    extra = sorted(path.name for path in given.iterdir() if path.is_dir() and path.name not in names)
    if extra:
        raise InputError(f"{given} holds {', '.join(extra)}, no subject of {benchmark.name}; remove it.")


def _content(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def write_settings(plan: Plan, options: argparse.Namespace) -> None:
    """Record what is asked, and with which versions and commit this start of the run works.

    More subjects and more seeds continue a run.

    Raises:
        InputError: the folder holds a run with other settings, or something else.
    """
    file = plan.folder / "settings.json"
    made = json.loads(json.dumps(plan.made))
    starts: list[Any] = []
    if file.is_file():
        before = json.loads(file.read_text())
        starts = before["starts"]
        for name, value in made.items():
            old = before["made"].get(name)
            if name == "photographs":
                other = [n for n in value if old.get(n, value[n]) != value[n]]
                if other:
                    raise InputError(
                        f"{plan.folder} was made with other photographs of {other[0]}; name another --output_dir."
                    )
                made[name] = old | value
            elif name != "seeds" and old != value:
                raise InputError(
                    f"{plan.folder} was made with {name} {json.dumps(old)}, not {json.dumps(value)}; name another "
                    "--output_dir."
                )
    elif plan.folder.is_dir() and any(path.name != "photographs" for path in plan.folder.iterdir()):
        raise InputError(f"--output_dir {plan.folder} holds something else; name a new folder.")
    scored = {name: getattr(options, name) for name in ("protocol", "dino", "clip", "lpips", "precision")}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    starts.append({"started": now, "git_commit": git_commit(), "versions": versions(), "command": sys.argv[1:]})
    write_text(file, json.dumps({"made": made, "scored": scored, "starts": starts}, indent=2) + "\n")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """The commit that runs, ``-dirty`` where files differ from it; None outside a repository."""
    command = ["git", "-C", str(running.ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tasks(plan: Plan, together: int = 1) -> list[running.Task]:
    """Everything that is still to be trained and drawn.

    Args:
        together: so many subjects and seeds are trained and drawn by one command, on one model; full fine-tuning has a
            model for each.
    """
    made, benchmark = plan.made, plan.benchmark
    base_model = {"pretrained_model_name_or_path": made["pretrained_model_name_or_path"]}
    drawing = base_model | {"num_images": benchmark.images_per_prompt, **made["generate"]}
    first = drawing.pop("seed", None)
    bare, trained = [], []
    for seed in plan.seeds:
        of_pictures = int(first) if first is not None else 1000 * seed
        if plan.drifts():
            prompts = dict.fromkeys(p for s in benchmark.subjects for p in benchmark.drift_prompts_of(s))
            bare.append(running.Item(plan.base(seed), None, list(prompts), of_pictures))
        for subject in benchmark.subjects:
            place, prompts = plan.place(subject, seed), benchmark.prompts_of(subject)
            if made["method"] == "none":
                bare.append(running.Item(place, None, prompts, of_pictures))
                continue
            own = {
                "instance_data_dir": plan.photographs[subject.name][0].parent,
                "instance_prompt": benchmark.instance_prompt(subject),
                "seed": seed,
            }
            prompts = prompts + benchmark.drift_prompts_of(subject)
            trained.append(running.Item(place, own, prompts, of_pictures))
    training = base_model | {"method": made["method"], **made["train"]}
    found = [running.task(item.place, [item], {}, drawing) for item in bare if not item.is_done()]
    # An adapter records its base model.
    drawing = {name: value for name, value in drawing.items() if name not in base_model}
    waiting = [item for item in trained if not item.is_done()]
    size = 1 if made["method"] == "full" else together
    for items in [waiting[i : i + size] for i in range(0, len(waiting), size)]:
        places = " ".join(str(item.place.relative_to(plan.folder)) for item in items)
        digest = hashlib.sha256(places.encode()).hexdigest()[:12]
        folder = plan.folder / "together" / digest if len(items) > 1 else items[0].place
        shorter = None if plan.continues is None else plan.continues.folder / folder.relative_to(plan.folder)
        found.append(running.task(folder, items, training, drawing, shorter))
    return found


def tasks_of_all(plans: Sequence[Plan], together: int) -> list[running.Task]:
    """The tasks of several runs, a run that continues another after it; each folder once."""
    found: dict[Path, list[running.Task]] = {}
    for plan in {plan.folder: plan for plan in plans}.values():
        first = plan
        while first.continues is not None:
            first = first.continues
        for task in tasks(plan, together):
            found.setdefault(first.folder / task.folder.relative_to(plan.folder), []).append(task)
    return [running.in_order(of_one) for of_one in found.values()]
