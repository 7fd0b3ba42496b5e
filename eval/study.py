"""A figure or a table of the paper from one command: train every setting on every subject and seed, draw, score, plot.

Each setting is a run of the benchmark in a folder of its own; what is there and whole is kept, so the same command
continues a study that was stopped. Under ``accelerate launch`` the trainings are spread over the processes.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.benchmark import load_benchmark, render_subjects
from data.errors import InputError
from eval import benchmark, norms, running
from eval.methods import TITLES
from eval.plan import Plan, check, tasks, write_settings
from eval.studies import STUDIES, Setting, Study
from eval.writing import write_text, written_whole

USUAL_STEPS = {"miniature": 300, "other": 1200}
"""What the training script does where ``--train`` gives no max_train_steps."""
Trial = tuple[Setting, Plan, argparse.Namespace]
"""A setting, its benchmark run, and that run's options."""
LOST_AT = (4.0, 8.0, 16.0)
"""Times the usual rate: what is lost there is said in the caption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=[*STUDIES, "comparison", "norms"], help="which figure or table")
    parser.add_argument("--benchmark", default="toybox", help="dreambooth, toybox or a YAML file in the same form")
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), help="instead of the study's own")
    parser.add_argument("--places", nargs="+", type=float, help="on the axis, instead of the study's own")
    benchmark.add_shared_arguments(parser)


def run(options: argparse.Namespace) -> None:
    if options.name == "norms":
        finish(norms.write(options.pretrained_model_name_or_path, options.output_dir / "norms"), {})
        return
    if options.name == "comparison":
        from eval import comparison

        comparison.run(options)
        return
    study = STUDIES[options.name]
    trials = plan(options, study.settings(options.methods, options.places or study.places))
    accelerator = start()
    failed = make(accelerator, options, trials)
    if accelerator.is_main_process:
        rows = gather(trials)
        with written_whole(options.output_dir / f"{options.name}.parquet") as temporary:
            rows.to_parquet(temporary, index=False)
        caption = write(options.output_dir / options.name, study, rows, ended(trials, rows))
        if study.axis is not None:
            write_pictures(options.output_dir / f"{options.name}-pictures", study.axis, trials)
        finish(caption, failed)


def start() -> Any:
    """The accelerator of a study."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=benchmark.LONGEST_WAIT)])


def make(accelerator: Any, options: argparse.Namespace, trials: Sequence[Trial]) -> dict[str, str]:
    """Train, draw and score what is not there yet; what went wrong, by folder."""
    from accelerate.utils import gather_object

    from eval.scoring import score

    if accelerator.is_main_process:
        for _, one, asked in trials:
            write_settings(one, asked)
    accelerator.wait_for_everyone()
    waiting = [task for _, one, _ in trials for task in tasks(one, options.together)]
    accelerator.wait_for_everyone()  # every process has looked before the first one writes
    index, count = accelerator.process_index, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    environment = running.child_environment(options.jobs, count, accelerator.local_process_index, on_gpu)
    show = accelerator.is_local_main_process
    mine = running.run_tasks(waiting[index::count], options.jobs, environment, show, fork=not on_gpu)
    failed: dict[str, str] = dict(gather_object(list(mine.items())))
    accelerator.wait_for_everyone()
    for _, one, asked in trials:
        own = {place: problem for place, problem in failed.items() if Path(place).is_relative_to(one.folder)}
        try:
            score(one, asked, accelerator, own)
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


def ended(trials: Sequence[Trial], rows: Any) -> str:
    """What a caption says of trainings that did not end, by setting."""
    one = rows[rows["protocol"] == rows["protocol"].iloc[0]]
    missing = []
    for setting, plan_of_it, _ in trials:
        asked = len(plan_of_it.benchmark.subjects) * len(plan_of_it.seeds)
        there = len(one[(one["label"] == setting.label) & (one["x"].eq(setting.x) | (setting.x is None))])
        if there < asked:
            place = "" if setting.x is None else f" at {setting.x:g}"
            missing.append(f"{setting.label}{place} ({asked - there} of {asked})")
    return f" Did not end, and in no mean: {', '.join(missing)}." if missing else ""


def said(failed: dict[str, str]) -> str:
    """What a caption says of what failed."""
    ended = sorted("/".join(Path(place).parts[-3:]) for place in failed)
    return f" Failed, and in no mean: {', '.join(ended)}." if ended else ""


def plan(options: argparse.Namespace, settings: Sequence[Setting], folder: Path | None = None) -> list[Trial]:
    """The benchmark run of each setting, checked; in ``folder``, by default one of the study's name.

    Raises:
        InputError
    """
    subjects = load_benchmark(options.benchmark)
    if options.photographs is None and all(subject.toybox is not None for subject in subjects.subjects):
        options.photographs = options.output_dir / "photographs"
        chosen = tuple(s for s in subjects.subjects if not options.subjects or s.name in options.subjects)
        render_subjects(dataclasses.replace(subjects, subjects=chosen), options.photographs)
    typed = {word.partition("=")[0].lstrip("-") for word in options.train}
    steps = USUAL_STEPS["miniature" if options.pretrained_model_name_or_path is None else "other"]
    for word in options.train:
        if word.lstrip("-").startswith("max_train_steps="):
            steps = int(word.partition("=")[2])
    found = []
    for setting in settings:
        clash = sorted(typed & set(setting.train))
        if clash:
            raise InputError(f"--train {clash[0]} is what {options.name} varies; leave it out.")
        asked = copy.copy(options)
        train = dict(setting.train)
        multiple = train.pop("steps", None)
        kept = [word for word in options.train if multiple is None or "max_train_steps" not in word]
        if multiple is not None:
            train["max_train_steps"] = round(steps * multiple)
        asked.train = [*kept, *(f"{name}={value}" for name, value in train.items())]
        asked.method, asked.generated_dir = setting.method, None
        asked.output_dir = (folder or options.output_dir / options.name) / setting.slug
        one = check(asked)
        without_drift = dataclasses.replace(one.benchmark, drift_prompts=())
        found.append((setting, dataclasses.replace(one, benchmark=without_drift), asked))
    return found


def gather(plans: Sequence[Trial]) -> Any:
    """A row for each setting, subject, seed and protocol: scores, and the training's last distance."""
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
        raise InputError("no setting could be scored; see log.txt in the folders of the subjects.")
    return pd.concat(found, ignore_index=True)


def last_distance(adapter: Path) -> float | None:
    """The mean distance ``|W' - W|_F`` that a training came to; None without its record."""
    file = adapter / "config.json"
    return json.loads(file.read_text()).get("reached", {}).get("distance") if file.is_file() else None


def write_pictures(path: Path, axis: str, trials: Sequence[Trial]) -> None:
    """The first picture of the benchmark's second prompt, of the first subject and seed, by every setting."""
    from eval import figures
    from eval.dreambooth import read_generated

    _, first, _ = trials[0]
    subject = first.benchmark.subjects[0]
    prompt = first.benchmark.prompts_of(subject)[:2][-1]
    rows: dict[str, dict[float, Path]] = {}
    for setting, one, _ in trials:
        folder = one.place(subject, 0) / "pictures"
        if setting.x is not None and (folder / "metadata.jsonl").is_file():
            found = [picture for picture, said in read_generated(folder) if said == prompt]
            rows.setdefault(setting.label, {})[setting.x] = found[0]
    if rows:
        figures.picture_rows(rows, axis, prompt, path)


def tabulate(rows: Any) -> Any:
    """A row for each setting: means, and the bootstrap 95% interval of DINO over subjects."""
    import pandas as pd

    from eval.results import mean_and_interval

    found = []
    for (label, x, method), of in rows.groupby(["label", "x", "method"], sort=False, dropna=False):
        one: dict[str, Any] = {"label": label, "x": x, "method": method, "distance": of["distance"].mean()}
        for name in ("dino", "clip_t"):
            interval = mean_and_interval(of, name)
            assert interval is not None
            one |= {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
        means = of.groupby("seed")["dino"].mean()
        one["dino_sd"] = means.std() if len(means) > 1 else None
        found.append(one)
    return pd.DataFrame(found)


def write(path: Path, study: Study, rows: Any, missing: str) -> Path:
    """The figure and its caption with all numbers, ``path`` with .png, .svg and .md; ``missing`` is of ``ended``."""
    from eval import figures
    from eval.results import mean_and_interval, paired_differences

    rows = rows[rows["protocol"] == rows["protocol"].iloc[0]]
    table = tabulate(rows)
    real = mean_and_interval(rows, "real_dino")
    of_real = None if real is None else real["mean"]
    if study.axis is None:
        figures.rows_of_a_table(table, of_real, path)
    else:
        figures.curves(table, study.axis, of_real, path)
    seeds, subjects = rows["seed"].nunique(), rows["subject"].nunique()
    lines = [f"![{study.shows}]({path.name}.png)", "", study.shows, ""]
    lines += [f"{subjects} subjects, {seeds} seeds; in brackets the bootstrap 95% interval over subjects, ± the"]
    lines += [f"standard deviation between seeds.{missing}", ""]
    place = [] if study.axis is None else [study.axis]
    head = ["", *place, "DINO", "CLIP-T", "distance"]
    lines += [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in table.itertuples():
        cells = [row.label, *([f"{row.x:g}"] if place else [])]
        spread = "" if row.dino_sd is None or row.dino_sd != row.dino_sd else f" ± {row.dino_sd:.3f}"
        cells += [f"{row.dino:.3f} [{row.dino_low:.3f}, {row.dino_high:.3f}]{spread}", f"{row.clip_t:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{row.distance:.3g}'])} |")
    if of_real is not None:
        lines += ["", f"Photographs with one another: DINO {of_real:.3f}."]
    usual = rows[rows["x"] == 1]
    beyond = [x for x in LOST_AT if (rows["x"] == x).any()]
    if study.axis is not None and len(usual) and beyond:
        times = "rate" if "rate" in study.axis else "steps"
        lines += ["", f"Against the usual {times}, paired by subject:", ""]
        lines += [f"| | | {' | '.join(f'{x:g} times' for x in beyond)} |", f"| --- | --- |{' ---: |' * len(beyond)}"]
        for label, of in rows.groupby("label", sort=False):
            for score, name in (("dino", "DINO"), ("clip_t", "CLIP-T")):
                cells = []
                for x in beyond:
                    one = paired_differences(of[of["x"] == x], of[of["x"] == 1]).get(score)
                    cells.append("" if one is None else f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]")
                lines.append(f"| {label} | {name} | {' | '.join(cells)} |")
    file = path.with_suffix(".md")
    write_text(file, "\n".join(lines) + "\n")
    return file
