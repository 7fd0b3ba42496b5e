"""The outputs of a study: its figure, a caption with all numbers, and one image per setting."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from data.benchmark import Subject
from delora_diffusers.atomic import write_text
from delora_diffusers.names import METADATA_NAME
from delora_diffusers.wording import counted
from eval.benchmark.results import bootstrap_interval, mean_and_interval, paired_differences
from eval.benchmark.tables import markdown
from eval.metrics.generated import read_generated
from eval.study import figures
from eval.study.settings import Study
from eval.study.trials import Trial, kept_step

PAIRED_SCORES = (("dino", "DINO"), ("clip_t", "CLIP-T"))


def unfinished(trials: Sequence[Trial], rows: pd.DataFrame, unit: str = "x") -> str:
    """A sentence that lists the trainings that did not finish, by setting; empty if all finished.

    Args:
        unit: of positions on the axis, x for multiples.
    """
    rows = first_protocol(rows)
    missing = []
    for trial in trials:
        setting, plan = trial.setting, trial.plan
        expected = len(plan.benchmark.subjects) * len(plan.seeds)
        finished = len(rows[(rows["label"] == setting.label) & (rows["x"].eq(setting.x) | (setting.x is None))])
        if finished < expected:
            position = "" if setting.x is None else f" at {setting.x:g}{unit}"
            missing.append(f"{setting.label}{position} ({expected - finished} of {expected})")
    return f" Not finished, and excluded from all means: {', '.join(missing)}." if missing else ""


def first_protocol(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first protocol, which figures and captions show."""
    return where(rows, "protocol", rows["protocol"].iloc[0])


def where(rows: pd.DataFrame, column: str, value: Any) -> pd.DataFrame:
    """The rows with this value in a column."""
    return cast(pd.DataFrame, rows[rows[column] == value])


def tabulate(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per setting: means, and the 95% bootstrap intervals of DINO and CLIP-T over subjects."""
    table = []
    for key, group in rows.groupby(["label", "x", "method"], sort=False, dropna=False):
        label, x, method = cast(tuple, key)
        row: dict[str, Any] = {"label": label, "x": x, "method": method, "distance": group["distance"].mean()}
        for name, _ in PAIRED_SCORES:
            interval = mean_and_interval(group, name)
            assert interval is not None
            row |= {name: interval["mean"], f"{name}_low": interval["low"], f"{name}_high": interval["high"]}
        means: Any = group.groupby("seed")["dino"].mean()
        row["dino_sd"] = means.std() if len(means) > 1 else None
        if "step" in group:
            row["step"] = group["step"].iloc[0]
        table.append(row)
    return pd.DataFrame(table)


def write(path: Path, study: Study, rows: pd.DataFrame, missing: str) -> Path:
    """The figure and its caption with all numbers: ``path`` with .png, .svg and .md.

    Args:
        missing: see ``unfinished``.
    """
    rows = first_protocol(rows)
    table = tabulate(rows)
    interval = mean_and_interval(rows, "real_dino")
    real = None if interval is None else interval["mean"]
    if study.axis is None:
        figures.plot_rows(table, real, path)
    else:
        figures.plot_curves(table, study.axis, real, path)
    seeds, subjects = rows["seed"].nunique(), rows["subject"].nunique()
    parts = [
        f"![{study.shows}]({path.name}.png)\n",
        f"{study.shows}\n",
        f"{counted(subjects, 'subject')}, {counted(seeds, 'seed')}. In brackets: 95% bootstrap interval over "
        f"subjects; ±: standard\ndeviation over seeds.{missing}\n",
        markdown(*means(table, study.axis)),
    ]
    if real is not None:
        parts.append(f"Real images (intra-subject): DINO {real:.3f}.\n")
    parts += against_the_last(rows) if study.axis is None else against_the_default(rows, study)
    file = path.with_suffix(".md")
    write_text(file, "\n".join(parts))
    return file


def means(table: pd.DataFrame, axis: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a caption."""
    rows = []
    for record in table.to_dict("records"):
        spread = "" if pd.isna(record["dino_sd"]) else f" ± {record['dino_sd']:.3f}"
        dino = f"{record['dino']:.3f} [{record['dino_low']:.3f}, {record['dino_high']:.3f}]{spread}"
        cells = [str(record["label"]), *([] if axis is None else [f"{record['x']:g}"])]
        cells += [f"{record['step']:g}"] if "step" in record else []
        rows.append([*cells, dino, f"{record['clip_t']:.3f}", f"{record['distance']:.3g}"])
    steps = ["steps"] if "step" in table else []
    return ["", *([] if axis is None else [axis]), *steps, "DINO", "CLIP-T", "distance"], rows


def against_the_default(rows: pd.DataFrame, study: Study) -> list[str]:
    """The differences of every curve from its point at the default, as parts of a caption."""
    compared = [x for x in study.compared if (rows["x"] == x).any()]
    if rows[rows["x"] == 1].empty or not compared:
        return []
    cells = []
    for label, group in rows.groupby("label", sort=False):
        at = {x: where(group, "x", x) for x in (1, *compared)}
        for score, name in PAIRED_SCORES:
            cells.append([str(label), name, *(difference(at[x], at[1], score) for x in compared)])
        cells.append([str(label), "distance", *(ratio(at[x], at[1]) for x in compared)])
    varied = "learning rate" if "rate" in str(study.axis) else "number of steps"
    return [
        f"Difference from the default {varied}, paired by subject (for the distance: ratio):\n",
        markdown(["", "", *(f"{x:g}x" for x in compared)], cells),
    ]


def against_the_last(rows: pd.DataFrame) -> list[str]:
    """The differences of every row of a table from the last row, as parts of a caption."""
    *others, last = rows["label"].unique()
    if not others:
        return []
    reference = where(rows, "label", last)
    cells = []
    for label in others:
        group = where(rows, "label", label)
        cells.append([label, *(difference(group, reference, score) for score, _ in PAIRED_SCORES)])
    return [
        f"Difference from {last}, paired by subject:\n",
        markdown(["", *(name for _, name in PAIRED_SCORES)], cells),
    ]


def difference(rows: pd.DataFrame, reference: pd.DataFrame, score: str) -> str:
    """The paired difference of a score and its interval, as text; empty if no subject has both."""
    interval = paired_differences(rows, reference).get(score)
    return "" if interval is None else f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


def ratio(rows: pd.DataFrame, reference: pd.DataFrame) -> str:
    """The ratio of the distances (geometric mean over subjects) and its interval, as text."""
    by_subject: list[Any] = [table.groupby("subject")["distance"].mean() for table in (rows, reference)]
    differences = np.log(by_subject[0] / by_subject[1]).dropna().to_numpy()
    if not len(differences):
        return ""
    low, high = bootstrap_interval(np.ones(len(differences)), differences)
    return f"{np.exp(differences.mean()):.2f} [{np.exp(low):.2f}, {np.exp(high):.2f}]"


def shown_prompt(trial: Trial, subject: Subject) -> str:
    """The prompt of the images in the grids: the benchmark's second."""
    return trial.plan.benchmark.prompts_of(subject)[:2][-1]


def shown_image(trial: Trial, subject: Subject) -> Path | None:
    """The first image of that prompt from the first seed; None if the run did not finish."""
    folder = trial.plan.images_folder(subject, 0, kept_step(trial.plan))
    if not (folder / METADATA_NAME).is_file():
        return None
    return next(image for image, prompt in read_generated(folder) if prompt == shown_prompt(trial, subject))


def write_images(
    path: Path, axis: str | None, trials: Sequence[Trial], tick: Callable[[float], str] = figures.multiple
) -> None:
    """A grid with one image per setting: the first image of the benchmark's second prompt, from the first seed.

    With an axis the grid shows the first subject, without one every subject.

    Args:
        path: of the study's figure, without a suffix; the grid is ``PATH-images``.
        tick: a position on the axis as text.
    """
    first = trials[0].plan.benchmark
    subjects = first.subjects if axis is None else first.subjects[:1]
    rows: dict[str, dict[str, Path]] = {}
    for trial in sorted(trials, key=lambda trial: trial.setting.x or 0):
        for subject in subjects:
            image = shown_image(trial, subject)
            if image is not None:
                column = subject.name if trial.setting.x is None else tick(trial.setting.x)
                rows.setdefault(trial.setting.label, {})[column] = image
    ordered = {trial.setting.label: rows[trial.setting.label] for trial in trials if trial.setting.label in rows}
    columns = [subject.name for subject in subjects]
    if axis is not None:
        columns = [tick(x) for x in sorted({trial.setting.x for trial in trials if trial.setting.x})]
    if ordered:
        prompts = list(dict.fromkeys(shown_prompt(trials[0], subject) for subject in subjects))
        title = prompts[0] if len(prompts) == 1 else ""
        figures.plot_images(ordered, columns, axis, title, path.with_name(f"{path.name}-images"))
