"""A figure or a table of the paper from one command: train every setting on every subject and seed, draw, score, plot.

Each setting is a run of the benchmark in a folder of its own; what is there and whole is kept, so the same command
continues a study that was stopped. Under ``accelerate launch`` the trainings are spread over the processes.
"""

import argparse
import copy
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.benchmark import load_benchmark, render_subjects
from data.errors import InputError
from eval import benchmark, norms, running
from eval.methods import TITLES
from eval.plan import check, check_base_model, pairs, tasks_of_all, write_settings
from eval.studies import STUDIES, Setting, Trial
from eval.writing import written_whole

USUAL_STEPS = {"miniature": 300, "other": 1200}
"""What the training script does where ``--train`` gives no max_train_steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", choices=[*STUDIES, "ablation-maps", "comparison", "norms"], help="which figure or table"
    )
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same form")
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), help="instead of the study's own")
    parser.add_argument("--places", nargs="+", type=float, help="on the axis, instead of the study's own")
    benchmark.add_shared_arguments(parser)
    group = parser.add_argument_group("ablation-maps")
    group.add_argument("--train_data_dir", type=Path, help="pairs of pictures and maps; toybox renders its own")
    group.add_argument("--map_dir", type=Path, help="others, whose maps are drawn and scored")
    group.add_argument("--score", nargs="+", default=[], metavar="FLAG=VALUE", help="of eval map2img: palette=ade20k")


def run(options: argparse.Namespace) -> None:
    for place in options.places or ():
        if not 0 < place < math.inf:
            raise InputError(f"--places {place:g} is no multiple; give positive numbers, 1 for the usual one.")
    if options.name == "norms":
        finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
        return
    if options.name == "comparison":
        from eval import comparison

        comparison.run(options)
        return
    if options.name == "ablation-maps":
        from eval import map_study

        map_study.run(options)
        return
    study = STUDIES[options.name]
    trials = plan(options, study.settings(options.methods, options.places or study.places))
    accelerator = benchmark.start()
    with alone(accelerator, options.output_dir):
        failed = make(accelerator, options, trials)
        if accelerator.is_main_process:
            from eval import captions

            rows = gather(trials, failed)
            with written_whole(options.output_dir / f"{options.name}.parquet") as temporary:
                rows.to_parquet(temporary, index=False)
            caption = captions.write(options.output_dir / options.name, study, rows, captions.ended(trials, rows))
            captions.write_pictures(options.output_dir / f"{options.name}-pictures", study.axis, trials)
            finish(caption, failed)


@contextmanager
def alone(accelerator: Any, output_dir: Path) -> Iterator[None]:
    """Hold the runs of an output folder, which studies share; another study at work on them is waited for."""
    if not accelerator.is_main_process:
        yield
        return
    (output_dir / "runs").mkdir(parents=True, exist_ok=True)
    with running.lock(output_dir / "runs" / ".lock"):
        yield


def make(accelerator: Any, options: argparse.Namespace, trials: Sequence[Trial]) -> dict[str, str]:
    """Train, draw and score what is not there yet; what went wrong, by folder."""
    from eval.scoring import load_models, score

    _, _, scored_alike = trials[0]
    runs = {one.folder: (one, asked) for _, one, asked in trials}.values()
    if accelerator.is_main_process:
        load_models(scored_alike, "cpu")  # refused now, not after days of training
        for one, asked in runs:
            write_settings(one, asked)
    accelerator.wait_for_everyone()
    failed = running.run_on_all(
        accelerator, tasks_of_all([one for _, one, _ in trials], options.together), options.jobs
    )
    models = load_models(scored_alike, accelerator.device)
    for one, asked in runs:
        own = {place: problem for place, problem in failed.items() if Path(place).is_relative_to(one.folder)}
        try:
            score(one, asked, accelerator, own, models)
        except InputError as error:  # not one of its trainings came to an end: a fact of the study, not the end of it
            failed.setdefault(str(one.folder), str(error))
            (one.folder / "subjects.csv").unlink(missing_ok=True)
    return failed


def finish(caption: Path, failed: dict[str, str]) -> None:
    """Show what was found, and end with an error where something failed."""
    print(f"{caption.read_text()}wrote {caption} and what lies beside it under the same name")
    if failed:
        for place, problem in failed.items():
            print(f"failed: {place}: {problem}", file=sys.stderr)
        sys.exit(f"error: {len(failed)} failed and are in no mean; run the same command again to try them anew.")


def plan(options: argparse.Namespace, settings: Sequence[Setting]) -> list[Trial]:
    """The benchmark run of each setting, checked; one that only trains longer than the one before continues it.

    Raises:
        InputError
    """
    typed = refuse_what_is_varied(options, settings)
    usual = USUAL_STEPS["miniature" if options.pretrained_model_name_or_path is None else "other"]
    steps = str(typed.get("max_train_steps", usual))
    if not steps.isdecimal() or int(steps) == 0:
        raise InputError(f"--train max_train_steps={steps} is no number of steps; give a whole number of at least 1.")
    check_base_model(options.pretrained_model_name_or_path)
    subjects = load_benchmark(options.benchmark)
    if options.photographs is None and all(subject.toybox is not None for subject in subjects.subjects):
        options.photographs = options.output_dir / "photographs"
        chosen = tuple(s for s in subjects.subjects if not options.subjects or s.name in options.subjects)
        render_subjects(dataclasses.replace(subjects, subjects=chosen), options.photographs)
    found: list[Trial] = []
    for setting in settings:
        asked = copy.copy(options)
        train = dict(setting.train)
        multiple = train.pop("steps", None)
        kept = [word for word in options.train if multiple is None or "max_train_steps" not in word]
        if multiple is not None:
            train["max_train_steps"] = max(1, round(int(steps) * multiple))
        asked.train = [*kept, *(f"{name}={value}" for name, value in train.items())]
        asked.method, asked.generated_dir = setting.method, None
        asked.output_dir = options.output_dir / "runs" / dataclasses.replace(setting, train=train).slug
        one = check(asked)
        without_drift = dataclasses.replace(one.benchmark, drift_prompts=())
        shorter = found[-1][1] if found and multiple is not None and continues(found[-1][0], setting, options) else None
        found.append((setting, dataclasses.replace(one, benchmark=without_drift, continues=shorter), asked))
    return found


def refuse_what_is_varied(options: argparse.Namespace, settings: Sequence[Setting]) -> dict[str, object]:
    """The flags of ``--train``.

    Raises:
        InputError: one of them is the study's own.
    """
    typed = pairs(options.train, "--train")
    for setting in settings:
        clash = sorted(typed.keys() & {*setting.train, "method"})
        if clash:
            raise InputError(f"--train {clash[0]} is what {options.name} varies; leave it out.")
    return typed


def continues(shorter: Setting, setting: Setting, options: argparse.Namespace) -> bool:
    """Whether a training is that of another setting gone on with: no rate of its may depend on the steps to come."""
    alike = dataclasses.replace(shorter, x=None, train=shorter.train | {"steps": 0}) == dataclasses.replace(
        setting, x=None, train=setting.train | {"steps": 0}
    )
    schedule = pairs(options.train, "--train").get("lr_scheduler", "constant")
    return alike and schedule in ("constant", "constant_with_warmup")


def gather(plans: Sequence[Trial], failed: dict[str, str]) -> Any:
    """A row for each setting, subject, seed and protocol: scores, and the training's last distance.

    Raises:
        InputError: there is none; tells the first problem of ``failed``.
    """
    import pandas as pd

    found = []
    for setting, one, _ in plans:
        if not (one.folder / "subjects.csv").is_file():
            continue
        rows = pd.read_csv(one.folder / "subjects.csv")
        rows.insert(0, "label", setting.label)
        rows.insert(1, "x", setting.x)
        rows.insert(2, "method", setting.method)
        rows["distance"] = [
            last_distance(one.folder / f"seed-{row.seed}" / str(row.subject) / "adapter") for row in rows.itertuples()
        ]
        found.append(rows)
    if not found:
        raise InputError(f"no setting could be scored; the first problem: {next(iter(failed.values()), 'none drawn')}")
    return pd.concat(found, ignore_index=True)


def last_distance(adapter: Path) -> float | None:
    """The mean distance ``|W' - W|_F`` that a training came to; None without its record."""
    file = adapter / "config.json"
    return json.loads(file.read_text()).get("reached", {}).get("distance") if file.is_file() else None
