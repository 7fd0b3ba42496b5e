"""Plan a benchmark run: check the request before any work starts, record it, and divide it into tasks."""

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
from data.photographs import find_photographs
from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.names import is_miniature, may_be_hub_id
from delora_diffusers.outputs import check_writable
from delora_diffusers.text_files import read_json
from eval.benchmark.tasks import ROOT, TRAINING_SCRIPT, SubjectCommands, SubjectRun, Task, in_order

PACKAGES = ("accelerate", "diffusers", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")


def flag_values(words: Sequence[str], flag: str) -> dict[str, object]:
    """``rank=16 center_crop`` as flags and values.

    Raises:
        InputError: a word is not FLAG=VALUE.
    """
    values: dict[str, object] = {}
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if not name.isidentifier():
            raise InputError(f"{flag} {word} is not FLAG=VALUE; give for example {flag} seed=1.")
        values[name] = value if equals else True
    return values


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked request: which subjects, with which photos and settings, in which folders.

    Attributes:
        photographs: by subject. settings: everything that the images depend on.
        continues: the same run with fewer training steps, from whose checkpoints this one continues.
    """

    benchmark: Benchmark
    folder: Path
    photographs: dict[str, list[Path]]
    settings: dict[str, Any]
    continues: "Plan | None" = None

    @property
    def seeds(self) -> range:
        return range(self.settings["seeds"])

    def subject_folder(self, subject: Subject, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / subject.name

    def base_folder(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}" / ".base"

    def measures_drift(self) -> bool:
        """Whether the run also generates images without the subject and compares them with the base model's."""
        return self.settings["method"] != "none" and bool(self.benchmark.drift_prompts)


def check(options: argparse.Namespace) -> None:
    """Reject bad flags before anything is rendered or loaded.

    Raises:
        InputError
    """
    for flag in ("seeds", "jobs", "together", "batch_size"):
        if getattr(options, flag) < 1:
            raise InputError(f"--{flag} is {getattr(options, flag)}; give at least 1.")
    if options.workers is not None and options.workers < 0:
        raise InputError(f"--workers is {options.workers}; give at least 0.")
    check_writable(options.output_dir, "--output_dir")
    benchmark = chosen_benchmark(options)
    toys = is_toybox(benchmark)
    if options.photographs is None and not toys:
        raise InputError(f"{benchmark.name} ships no photos; give their folder with --photographs.")
    if options.generated_dir is not None:
        check_generated(options, benchmark)
        return
    if options.pretrained_model_name_or_path is None and not toys:
        raise InputError(f"{benchmark.name} needs a base model; give it with --pretrained_model_name_or_path.")
    if not TRAINING_SCRIPT.is_file():
        raise InputError(f"{TRAINING_SCRIPT} is missing; run benchmarks from a clone of the repository.")
    check_base_model(options.pretrained_model_name_or_path)
    flag_values(options.train, "--train")
    flag_values(options.generate, "--generate")


def chosen_benchmark(options: argparse.Namespace) -> Benchmark:
    """The benchmark with the subjects that ``--subjects`` asks for.

    Raises:
        InputError: a subject is unknown.
    """
    benchmark = load_benchmark(options.benchmark)
    if not options.subjects:
        return benchmark
    known = {subject.name for subject in benchmark.subjects}
    unknown = [name for name in options.subjects if name not in known]
    if unknown:
        raise InputError(f"--subjects {unknown[0]} is not in {benchmark.name}, which has {', '.join(sorted(known))}.")
    chosen = tuple(subject for subject in benchmark.subjects if subject.name in options.subjects)
    return dataclasses.replace(benchmark, subjects=chosen)


def is_toybox(benchmark: Benchmark) -> bool:
    """Whether all subjects are toys, whose photos can be rendered."""
    return all(subject.toybox is not None for subject in benchmark.subjects)


def with_defaults(options: argparse.Namespace) -> argparse.Namespace:
    """The options with the protocol, the LPIPS backbone and the folder of photos that the benchmark implies."""
    options = argparse.Namespace(**vars(options))
    toys = is_toybox(chosen_benchmark(options))
    options.protocol = options.protocol or (["toybox"] if toys else ["delora"])
    options.lpips = options.lpips or ("none" if options.protocol == ["toybox"] else "alex")
    options.photographs = options.photographs or options.output_dir / "photographs"
    return options


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
        "train": flag_values(options.train, "--train"),
        "generate": flag_values(options.generate, "--generate"),
        "seeds": options.seeds,
    }
    if options.generated_dir is not None:
        settings |= {"generated_dir": str(options.generated_dir), "method": "none"}
    return Plan(benchmark, options.output_dir, photographs, settings)


@functools.cache
def check_base_model(name_or_path: str | None) -> None:
    """Reject a model that no training could load. For a model on the hub only the index is downloaded.

    Raises:
        InputError
    """
    if name_or_path is None or is_miniature(name_or_path) or (Path(name_or_path) / "model_index.json").is_file():
        return
    if Path(name_or_path).exists() or not may_be_hub_id(name_or_path):
        raise InputError(
            f"--pretrained_model_name_or_path {name_or_path} has no model_index.json; give a complete pipeline folder, "
            "as pipeline.save_pretrained writes it, or a hub id."
        )
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name_or_path, "model_index.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--pretrained_model_name_or_path {name_or_path} is not a pipeline folder and cannot be downloaded from "
            f"the hub ({reason}); give another, or download it first."
        ) from error


def check_generated(options: argparse.Namespace, benchmark: Benchmark) -> None:
    """Reject images that cannot belong to the benchmark.

    Raises:
        InputError: the folder does not exist or contains a folder that is not a subject's, or flags for training or
            generating are given.
    """
    given: Path = options.generated_dir
    if options.train or options.generate or options.seeds != 1:
        raise InputError("--generated_dir scores existing images; leave out --train, --generate and --seeds.")
    if not given.is_dir():
        raise InputError(f"--generated_dir {given} is not a folder; give a folder with one folder per subject.")
    names = {subject.name for subject in benchmark.subjects}
    extra = sorted(path.name for path in given.iterdir() if path.is_dir() and path.name not in names)
    if extra:
        raise InputError(f"{given} has a folder {extra[0]}, which is not a subject of {benchmark.name}; remove it.")


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
    scoring = {name: getattr(options, name) for name in ("protocol", "dino", "clip", "lpips", "precision")}
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


def tasks(plan: Plan, together: int = 1) -> list[Task]:
    """The tasks that train and generate everything that is missing.

    Args:
        together: how many subjects and seeds one command trains on one model; full fine-tuning needs a model for each.
    """
    settings, benchmark = plan.settings, plan.benchmark
    base_model = {"pretrained_model_name_or_path": settings["pretrained_model_name_or_path"]}
    generation = base_model | {"num_images": benchmark.images_per_prompt, **settings["generate"]}
    seed_flag = generation.pop("seed", None)
    base_runs, subject_runs = [], []
    for seed in plan.seeds:
        image_seed = int(seed_flag) if seed_flag is not None else 1000 * seed
        if plan.measures_drift():
            prompts = dict.fromkeys(p for s in benchmark.subjects for p in benchmark.drift_prompts_of(s))
            base_runs.append(SubjectRun(plan.base_folder(seed), None, list(prompts), image_seed))
        for subject in benchmark.subjects:
            folder, prompts = plan.subject_folder(subject, seed), benchmark.prompts_of(subject)
            if settings["method"] == "none":
                base_runs.append(SubjectRun(folder, None, prompts, image_seed))
                continue
            flags = {
                "instance_data_dir": plan.photographs[subject.name][0].parent,
                "instance_prompt": benchmark.instance_prompt(subject),
                "seed": seed,
            }
            subject_runs.append(SubjectRun(folder, flags, prompts + benchmark.drift_prompts_of(subject), image_seed))
    training = base_model | {"method": settings["method"], **settings["train"]}
    tasks_left = [SubjectCommands(run.folder, [run], {}, generation).task() for run in base_runs if not run.is_done()]
    # An adapter records its base model, so generate needs no flag for it.
    generation = {name: value for name, value in generation.items() if name not in base_model}
    remaining = [run for run in subject_runs if not run.is_done()]
    size = 1 if settings["method"] == "full" else together
    for runs in [remaining[i : i + size] for i in range(0, len(remaining), size)]:
        names = " ".join(str(run.folder.relative_to(plan.folder)) for run in runs)
        digest = hashlib.sha256(names.encode()).hexdigest()[:12]
        folder = plan.folder / "together" / digest if len(runs) > 1 else runs[0].folder
        shorter = None if plan.continues is None else plan.continues.folder / folder.relative_to(plan.folder)
        tasks_left.append(SubjectCommands(folder, runs, training, generation, shorter).task())
    return tasks_left


def tasks_of_all(plans: Sequence[Plan], together: int) -> list[Task]:
    """The tasks of several runs, each folder once; a run that continues another follows it in the same task."""
    by_folder: dict[Path, list[Task]] = {}
    for plan in {plan.folder: plan for plan in plans}.values():
        first = plan
        while first.continues is not None:
            first = first.continues
        for task in tasks(plan, together):
            by_folder.setdefault(first.folder / task.folder.relative_to(plan.folder), []).append(task)
    return [in_order(chain) for chain in by_folder.values()]
