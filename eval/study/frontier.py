"""Subject fidelity against prompt fidelity: every method on a grid of settings, as the frontier of both scores.

A single score rewards overfitting (subject fidelity) or doing nothing (prompt fidelity). This module trains, generates
and scores, and collects the rows; ``frontier_report`` turns the rows into figures, tables and a page.
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from delora_diffusers.errors import InputError
from delora_diffusers.image_files import load_rgb
from eval.benchmark import scoring
from eval.benchmark.checks import chosen_benchmark, total_steps
from eval.benchmark.collect import collect
from eval.benchmark.plan import write_settings
from eval.benchmark.results import SubjectImages, score_subject
from eval.benchmark.run import run_plans, start_accelerator
from eval.metrics.embedding import embed
from eval.metrics.encoders import Encoders
from eval.metrics.protocols import PROTOCOLS
from eval.study import frontier_page, frontier_report
from eval.study.frontier_settings import AXES, BASE, BASE_SETTING, STRENGTHS, VARIANTS, check_keys, settings_of
from eval.study.trials import Trial, distance_of, exclusive, finish, plan_trials, write_rows

if TYPE_CHECKING:
    from accelerate import Accelerator

MOST_WORKERS = 16
"""Processes that decode images, for each process of ``accelerate launch``."""

Point = tuple[Trial, float, SubjectImages]
"""A run, a strength, and the images of one subject and seed."""


def run(options: argparse.Namespace) -> None:
    """Train, score and write ``frontier.*``; with ``--from_rows`` only the last, from the rows of an earlier run."""
    path = options.output_dir / "frontier"
    if options.from_rows:
        finish(frontier_report.write(path, frontier_report.read(path.with_suffix(".parquet")), options), {})
        return
    trials = plan(options)
    accelerator = start_accelerator()
    with exclusive(accelerator, options.output_dir):
        failed, rows = train_and_score(accelerator, options, trials)
        if accelerator.is_main_process:
            check_scored(rows, failed)
            write_rows(path.with_suffix(".parquet"), rows)
            frontier_page.write_thumbnails(path.with_name("frontier-images"), rows, trials)
            caption = frontier_report.write(path, rows, options)
            finish(caption, failed)


def check_scored(rows: pd.DataFrame, failed: dict[str, str]) -> None:
    """Stop if nothing can be compared.

    Raises:
        InputError: a run of the base model failed, or all others; gives the first problem.
    """
    problem = next(iter(failed.values()), "nothing was generated")
    scored = rows["dino"].notna()
    if not scored[rows["key"] == BASE].all():
        raise InputError(f"the base model could not be scored for every subject; the first problem: {problem}")
    if not scored[rows["key"] != BASE].any():
        raise InputError(f"no setting could be scored; the first problem: {problem}")


def plan(options: argparse.Namespace) -> list[Trial]:
    """The runs of the study: every setting of every variant, the longest trainings first, and the base model.

    The images of the base model, against which the drift is measured, are generated once, in the run of the base model.

    Raises:
        InputError: a flag is wrong, or photos are missing.
    """
    keys = options.methods or list(VARIANTS)
    check_keys(keys)
    check_judges(options)
    replaced = {name: getattr(options, name) for name in AXES}
    settings = [setting for key in keys for setting in settings_of(key, replaced)]
    alone = {"full"}  # a model for each subject, so a setting takes as long as all its subjects
    settings.sort(key=lambda setting: (setting.method in alone, setting.train["steps"]), reverse=True)
    trials = plan_trials(options, [BASE_SETTING, *settings], measures_drift=True)
    protocols = trials[0].options.protocol
    if len(protocols) > 1 or PROTOCOLS[protocols[0]].pairs_by_name:
        raise InputError(f"--protocol {' '.join(protocols)} does not fit frontier; give one of delora and dreambooth.")
    base_run, strengths = trials[0].plan.folder, tuple(s for s in strengths_of(options) if s != 1)
    of_methods = [
        dataclasses.replace(trial, plan=dataclasses.replace(trial.plan, base_run=base_run, strengths=strengths))
        for trial in trials[1:]
    ]
    by_folder = {trial.plan.folder: trial for trial in of_methods}  # numbers of steps may round to the same
    return [*by_folder.values(), trials[0]]


def strengths_of(options: argparse.Namespace) -> list[float]:
    """The strengths at which images are generated; 1, the trained adapter, is always among them."""
    return sorted({1.0, *(options.strengths or STRENGTHS)})


def check_judges(options: argparse.Namespace) -> None:
    """Reject subjects of ``--judges`` that are not in the study.

    Raises:
        InputError
    """
    names = [subject.name for subject in chosen_benchmark(options).subjects]
    frontier_report.check_judges(options.judges, names)


def train_and_score(
    accelerator: "Accelerator", options: argparse.Namespace, trials: Sequence[Trial]
) -> tuple[dict[str, str], pd.DataFrame]:
    """Train, generate and score what is missing.

    Returns:
        The errors by folder, and a row per setting, strength, subject and seed.
    """
    first = trials[0].options
    if accelerator.is_main_process:
        scoring.load_models(first, "cpu")  # fails now instead of after the training
        for trial in trials:
            write_settings(trial.plan, trial.options)
    accelerator.wait_for_everyone()
    failed = run_plans(accelerator, [trial.plan for trial in trials], options.together, options.jobs)
    encoders = next(iter(scoring.load_models(first, accelerator.device).encoders.values()))
    processes = accelerator.num_processes
    rows, failed_here = score(trials[accelerator.process_index :: processes], options, encoders, failed, processes)

    from accelerate.utils import gather_object

    rows, failed_anywhere = gather_object(rows), dict(gather_object(list(failed_here.items())))
    return failed | failed_anywhere, in_order(rows)


def in_order(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows by variant, in the order of ``VARIANTS``, and by setting; ``thumbnail`` numbers the points of each."""
    order = {key: number for number, key in enumerate([BASE, *VARIANTS])}
    table = pd.DataFrame(rows)
    table["variant"] = table["key"].map(order)
    axes = ["variant", "step_multiple", "schedule", "rate", "bound", "strength", "run", "seed"]
    table = table.sort_values(axes, kind="stable").drop(columns="variant").reset_index(drop=True)
    point = pd.Series(list(zip(table["run"], table["strength"])))
    table["thumbnail"] = point.groupby(table["key"]).transform(lambda points: pd.factorize(points)[0])
    return table


def score(
    trials: Sequence[Trial],
    options: argparse.Namespace,
    encoders: Encoders,
    failed: dict[str, str],
    processes: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of some runs, on one process. All images are encoded at once, and all prompts.

    Args:
        failed: what could not be trained or generated. processes: how many share the cores of this machine.

    Returns:
        The rows, without scores for runs that did not finish, and the errors by folder of what could not be scored.
    """
    new: dict[str, str] = {}
    points: list[Point] = []
    for trial in trials:
        for strength in strengths_at(trial, options):
            problems = dict(failed)
            try:
                images = collect(trial.plan, trial.options, problems, strength)[None]
            except InputError as error:  # an exception would leave the other processes waiting
                new[str(trial.plan.folder)] = str(error)
                continue
            new |= {folder: problem for folder, problem in problems.items() if folder not in failed}
            points += [(trial, strength, of_subject) for of_subject in images]
    workers = options.workers
    settings: dict[str, Any] = {"batch_size": options.batch_size, "cache_dir": options.output_dir / "runs/.embeddings"}
    files = list(dict.fromkeys(path for _, _, images in points for path in images.files()))
    if workers is None:
        workers = min(MOST_WORKERS, (os.cpu_count() or 1) // processes, len(files) // 64)
    try:
        vectors = embed(files, encoders.by_key(), workers=workers, **settings)
    except InputError:
        points, files = readable(points, new)
        vectors = embed(files, encoders.by_key(), workers=workers, **settings)
    features = {key: dict(zip(files, of_files)) for key, of_files in vectors.items()}
    prompts = list(dict.fromkeys(prompt for _, _, images in points for prompt in images.prompts))
    texts = dict(zip(prompts, encoders.clip.encode_texts(prompts).cpu())) if prompts else {}
    scored = {}
    for trial, strength, images in points:
        _, scores = score_subject(images, features["dino"], features["clip"], texts, None)
        scored[trial.plan.folder, strength, images.subject, images.seed] = scores
    rows = [
        row_of(trial, strength, subject.name, seed, scored.get((trial.plan.folder, strength, subject.name, seed), {}))
        for trial in trials
        for strength in strengths_at(trial, options)
        for seed in trial.plan.seeds
        for subject in trial.plan.benchmark.subjects
    ]
    return rows, new


def readable(points: Sequence[Point], problems: dict[str, str]) -> tuple[list[Point], list[Path]]:
    """The points whose images can all be read, and their files; the errors of the others go to ``problems``."""
    kept, files = [], {}
    for trial, strength, images in points:
        try:
            for file in images.files():
                load_rgb(file)
        except InputError as error:
            problems[str(trial.plan.folder / f"seed-{images.seed}" / images.subject)] = str(error)
            continue
        kept.append((trial, strength, images))
        files |= dict.fromkeys(images.files())
    return kept, list(files)


def strengths_at(trial: Trial, options: argparse.Namespace) -> list[float]:
    """The strengths of a run; the base model's images are scored once."""
    return [1.0] if trial.setting.method == BASE else strengths_of(options)


def row_of(trial: Trial, strength: float, subject: str, seed: int, scores: dict[str, Any]) -> dict[str, Any]:
    """The row of one setting, strength, subject and seed. The base model is every method at strength 0."""
    setting, is_base = trial.setting, trial.setting.method == BASE
    variant = VARIANTS.get(setting.label)
    bound = None if variant is None or variant.bound is None else setting.train[variant.bound]
    distance = 0.0 if is_base else distance_of(trial.plan.folder / f"seed-{seed}" / subject / "adapter")
    names = ("dino", "clip_t", "clip_i", "real_dino")
    return {
        "key": BASE if variant is None else setting.label,
        "label": setting.label if variant is None else variant.title,
        "method": setting.method,
        "run": trial.plan.folder.name,
        "learning_rate": setting.train.get("learning_rate"),
        "rate": setting.x,
        "bound": bound,
        "schedule": setting.train.get("lr_scheduler"),
        "steps": None if is_base else total_steps(trial.plan.settings),
        "step_multiple": setting.train.get("steps"),
        "strength": 0.0 if is_base else strength,
        "subject": subject,
        "seed": seed,
        **{name: scores.get(name) for name in names},
        "drift": 0.0 if is_base else scores.get("drift"),
        "distance": None if distance is None else distance * abs(strength),
    }
