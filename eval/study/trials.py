"""Run the settings of a study. Each is a benchmark run in its own folder, which studies share.

Results that are already complete are kept, so the same command continues a study that was stopped. Under ``accelerate
launch`` the trainings are spread over the processes.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors import safe_open

from data.benchmark import render_subjects
from delora_diffusers.atomic import atomic_write
from delora_diffusers.errors import InputError
from delora_diffusers.locking import locked_folder
from delora_diffusers.names import CHECKPOINT_PREFIX, CONFIG_NAME, METADATA_KEY, MINIATURE, WEIGHTS_NAME
from delora_diffusers.text_files import parse_json, read_json
from eval.benchmark import scoring
from eval.benchmark.checks import (
    check,
    check_base_model,
    chosen_benchmark,
    is_toybox,
    total_steps,
    with_defaults,
)
from eval.benchmark.plan import Plan, make_plan, write_settings
from eval.benchmark.run import exit_with_failures, run_plans, start_accelerator
from eval.benchmark.tasks import flag_values
from eval.study.settings import Setting

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting, its benchmark run, and that run's options."""

    setting: Setting
    plan: Plan
    options: argparse.Namespace


def plan_trials(options: argparse.Namespace, settings: Sequence[Setting], measures_drift: bool = False) -> list[Trial]:
    """Check the benchmark run of each setting, and render the photos of toys. A run that differs from the previous one
    only in that it has more steps continues it.

    Raises:
        InputError: a flag is wrong, or photos are missing.
    """
    train_flags = check_not_varied(options, settings)
    base_model = {"pretrained_model_name_or_path": options.pretrained_model_name_or_path}
    steps = total_steps({"train": train_flags, **base_model})
    check_base_model(options.pretrained_model_name_or_path)
    options = argparse.Namespace(**vars(options) | {"generated_dir": None, "method": "none"})
    check(options)
    benchmark = chosen_benchmark(options)
    if options.photographs is None and is_toybox(benchmark):
        options.photographs = options.output_dir / "photographs"
        render_subjects(benchmark, options.photographs)
    options.shared_class_images = options.output_dir / "class-images"
    trials: list[Trial] = []
    for setting in settings:
        trial_options = copy.copy(options)
        train = dict(setting.train)
        multiple = train.pop("steps", None)
        words = [word for word in options.train if multiple is None or "max_train_steps" not in word]
        if multiple is not None:
            train["max_train_steps"] = max(1, round(steps * multiple))
        trial_options.train = [*words, *(f"{name}={value}" for name, value in train.items())]
        trial_options.method = setting.method
        slug = dataclasses.replace(setting, train=train).slug
        prefix = f"{options.recipe}-" if options.recipe else ""  # the same setting with and without are two runs
        trial_options.output_dir = options.output_dir / "runs" / f"{prefix}{slug}"
        trial_options = with_defaults(trial_options)
        plan = make_plan(trial_options)
        benchmark = plan.benchmark if measures_drift else dataclasses.replace(plan.benchmark, drift_prompts=())
        previous = trials[-1] if trials and multiple is not None else None
        shorter = previous.plan if previous and continues(previous.setting, setting, options) else None
        trials.append(Trial(setting, dataclasses.replace(plan, benchmark=benchmark, continues=shorter), trial_options))
    return trials


def check_not_varied(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, object]:
    """The flags in ``--train``.

    Raises:
        InputError: the study itself varies one of the flags.
    """
    train_flags = flag_values(options.train, "--train")
    for setting in settings:
        clash = sorted(train_flags.keys() & {*setting.train, "method"})
        if clash:
            raise InputError(f"--train {clash[0]} is what {options.name} varies; leave it out.")
    return train_flags


def continues(shorter: Setting, setting: Setting, options: argparse.Namespace) -> bool:
    """Whether a training can continue a shorter one: the rate must not depend on the total number of steps, and a
    training that is scored along the way needs all of its checkpoints."""
    if options.score_every or shorter.train.get("steps", 0) >= setting.train["steps"]:
        return False
    without_steps = [dataclasses.replace(s, label="", x=None, train=s.train | {"steps": 0}) for s in (shorter, setting)]
    flags = flag_values(options.train, "--train") | setting.train
    schedule = flags.get("lr_scheduler", "constant")
    return without_steps[0] == without_steps[1] and schedule in ("constant", "constant_with_warmup")


@contextmanager
def exclusive(accelerator: "Accelerator", output_dir: Path) -> Iterator[None]:
    """Lock the runs of an output folder, which studies share, and wait while another study uses them."""
    if not accelerator.is_main_process:
        yield
        return
    with locked_folder(output_dir / "runs", wait=True):
        yield


def run_trials(accelerator: "Accelerator", options: argparse.Namespace, trials: Sequence[Trial]) -> dict[str, str]:
    """Train, generate and score what is missing; returns the errors by folder."""
    first = trials[0].options
    by_folder = {trial.plan.folder: trial for trial in trials}.values()
    if accelerator.is_main_process:
        scoring.load_models(first, "cpu")  # fails now instead of after days of training
        for trial in by_folder:
            write_settings(trial.plan, trial.options)
    accelerator.wait_for_everyone()
    failed = run_plans(accelerator, [trial.plan for trial in trials], options.together, options.jobs)
    models = scoring.load_models(first, accelerator.device)
    for trial in by_folder:
        folder = trial.plan.folder
        failed_here = {path: problem for path, problem in failed.items() if Path(path).is_relative_to(folder)}
        try:
            scoring.score(trial.plan, trial.options, accelerator, failed_here, models)
        except InputError as error:  # every training of this setting failed, which is a result of the study
            failed.setdefault(str(folder), str(error))
            (folder / "subjects.csv").unlink(missing_ok=True)
    return failed


def run_study(
    options: argparse.Namespace,
    settings: Sequence[Setting],
    write: Callable[[pd.DataFrame, Sequence[Trial]], Path],
) -> None:
    """Train, generate and score all settings, and write what they show.

    Args:
        write: writes the rows of ``gather``, figures and the caption, in the main process; returns the caption's file.
    """
    trials = plan_trials(options, settings)
    accelerator = start_accelerator()
    with exclusive(accelerator, options.output_dir):
        failed = run_trials(accelerator, options, trials)
        if accelerator.is_main_process:
            finish(write(gather(trials, failed), trials), failed)


def gather(trials: Sequence[Trial], failed: dict[str, str]) -> pd.DataFrame:
    """A row per setting, subject, seed and protocol: scores, and the distance at the step that was scored.

    Raises:
        InputError: nothing was scored; gives the first problem of ``failed``.
    """
    tables = []
    for trial in trials:
        file = trial.plan.folder / "subjects.csv"
        if not file.is_file():
            continue
        rows = pd.read_csv(file)
        rows.insert(0, "label", trial.setting.label)
        rows.insert(1, "x", trial.setting.x)
        rows.insert(2, "method", trial.setting.method)
        step = kept_step(trial.plan)
        rows["distance"] = [
            distance_of(trial.plan.folder / f"seed-{seed}" / str(subject) / "adapter", step)
            for seed, subject in zip(rows["seed"], rows["subject"])
        ]
        tables.append(rows)
    if not tables:
        problem = next(iter(failed.values()), "nothing was generated")
        raise InputError(f"no setting could be scored; the first problem: {problem}")
    return pd.concat(tables, ignore_index=True)


def kept_step(plan: Plan) -> int | None:
    """The training step whose images were scored; None if it is the last."""
    file = plan.folder / "summary.json"
    step = read_json(file).get("step") if file.is_file() else None
    return step if step in plan.steps else None


def distance_of(adapter: Path, step: int | None = None) -> float | None:
    """The mean distance ``|W' - W|_F`` at a checkpoint, or at the end of training; None if it was not recorded."""
    if step is not None:
        file = adapter / f"{CHECKPOINT_PREFIX}{step}" / WEIGHTS_NAME
        if not file.is_file():
            return None
        with safe_open(file, framework="np") as opened:
            header = parse_json(opened.metadata()[METADATA_KEY])
        return header.get("training", {}).get("distance")
    file = adapter / CONFIG_NAME
    return read_json(file).get("reached", {}).get("distance") if file.is_file() else None


def base_model_name(options: argparse.Namespace) -> str:
    """The base model's name without its folder, so that rows of several base models can be joined."""
    return Path(options.pretrained_model_name_or_path or MINIATURE).name


def write_rows(file: Path, rows: pd.DataFrame) -> None:
    """Write a table as Parquet."""
    with atomic_write(file) as temporary:
        rows.to_parquet(temporary, index=False)


def finish(caption: Path, failed: dict[str, str]) -> None:
    """Print the caption, and exit with an error if something failed."""
    print(f"{caption.read_text()}wrote {caption} and the files of the same name beside it")
    exit_with_failures(failed)
