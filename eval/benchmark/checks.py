"""Check the flags of a benchmark or study before any work starts, and fill in what they imply."""

import argparse
import dataclasses
import functools
import importlib
import runpy
from pathlib import Path
from typing import Any

from data.benchmark import Benchmark, load_benchmark
from delora_diffusers.dispatch import Parser
from delora_diffusers.errors import InputError
from delora_diffusers.names import is_miniature, may_be_hub_id
from delora_diffusers.outputs import check_writable
from eval.benchmark.tasks import TRAINING_SCRIPT, flag_values, flags

DEFAULT_STEPS = {"miniature": 300, "other": 1200}
"""Of the training script, unless ``--train`` sets max_train_steps."""
SET_FOR_IMAGES = ("adapter", "output_dir", "prompt", "prompts_file", "requests_file")
"""Flags of generate that differ between subjects."""
SET_BY_BENCHMARK = ("class_prompt", "class_data_dir", "instance_data_dir", "instance_prompt", "output_dir")
"""Flags of the training script that differ between subjects."""


def check(options: argparse.Namespace) -> None:
    """Reject bad flags before anything is rendered or loaded.

    Raises:
        InputError
    """
    for flag in ("seeds", "jobs", "together", "batch_size", "images_per_prompt"):
        value = getattr(options, flag)
        if value is not None and value < 1:
            raise InputError(f"--{flag} is {value}; give at least 1.")
    if options.score_every is not None and options.score_every < 0:
        raise InputError(f"--score_every is {options.score_every}; give a number of steps, 0 for the last only.")
    if options.class_images is not None and not options.class_images.is_dir():
        raise InputError(f"--class_images {options.class_images} is not a folder; give one with a folder per class.")
    if options.identifier is not None and not options.identifier.strip():
        raise InputError("--identifier is empty; give a word such as sks.")
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
    check_training_flags(options)
    check_generation_flags(options)


def check_generation_flags(options: argparse.Namespace) -> None:
    """Reject flags that generate does not have, or that the benchmark sets itself.

    Raises:
        InputError
    """
    parser = Parser()
    # Not a static import: like the training script, generate is started as a command, and eval does not depend on it.
    importlib.import_module("delora_diffusers.commands.generate").add_arguments(parser)
    known = {action.dest for action in parser._actions}
    for name in flag_values(options.generate, "--generate"):
        if name not in known:
            raise InputError(f"--generate {name} is not a flag of `python -m delora_diffusers generate`; leave it out.")
        if name in SET_FOR_IMAGES:
            raise InputError(f"--generate {name} is set for every run; leave it out.")


def check_training_flags(options: argparse.Namespace) -> None:
    """Reject training flags that the benchmark sets itself.

    Raises:
        InputError
        SystemExit: the training script has no such flag, or it takes other values.
    """
    train = flag_values(options.train, "--train")
    for name in SET_BY_BENCHMARK:
        if name in train:
            raise InputError(f"--train {name} differs between subjects and is set for each of them; leave it out.")
    number_of_class_images(train)
    if options.score_every:
        for name, reason in (("checkpointing_steps", "is set by --score_every"), ("config", "may hide the steps")):
            if name in train:
                raise InputError(f"--train {name} {reason}; leave it out, or turn that off with --score_every 0.")
        total_steps({"train": train, "pretrained_model_name_or_path": options.pretrained_model_name_or_path})
    parser: Parser = runpy.run_path(str(TRAINING_SCRIPT))["build_parser"]()
    parser.source = "--train"
    parser.parse_args(flags(train))  # ends with a sentence if there is no such flag, or if it takes other values


def number_of_class_images(train: dict[str, Any]) -> int:
    """The number of class images of each class.

    Raises:
        InputError: ``--train num_class_images`` is not a number.
    """
    number = str(train.get("num_class_images", 100))
    if not number.isdecimal() or int(number) == 0:
        raise InputError(f"--train num_class_images={number} is not a number of images; give a positive integer.")
    return int(number)


def total_steps(settings: dict[str, Any]) -> int:
    """The number of training steps of each subject.

    Raises:
        InputError: ``--train max_train_steps`` is not a number.
    """
    default = DEFAULT_STEPS["miniature" if is_miniature(settings["pretrained_model_name_or_path"]) else "other"]
    steps = str(settings["train"].get("max_train_steps", default))
    if not steps.isdecimal() or int(steps) == 0:
        raise InputError(f"--train max_train_steps={steps} is not a number of steps; give a positive integer.")
    return int(steps)


def chosen_benchmark(options: argparse.Namespace) -> Benchmark:
    """The benchmark with the subjects, the identifier and the number of images that the flags ask for.

    Raises:
        InputError: a subject is unknown.
    """
    benchmark = load_benchmark(options.benchmark)
    changes = {name: getattr(options, name) for name in ("identifier", "images_per_prompt")}
    benchmark = dataclasses.replace(benchmark, **{name: v for name, v in changes.items() if v is not None})
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
    options.shared_class_images = getattr(options, "shared_class_images", options.output_dir / "class-images")
    return options


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
