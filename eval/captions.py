"""What a study says: its figure, its caption with all numbers, one picture of every setting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval import figures
from eval.dreambooth import read_generated
from eval.results import bootstrap_interval, mean_and_interval, paired_differences
from eval.studies import Study, Trial
from eval.writing import write_text


def ended(trials: Sequence[Trial], rows: Any) -> str:
    """What a caption says of trainings that did not end, by setting."""
    one = rows[rows["protocol"] == rows["protocol"].iloc[0]]
    missing = []
    for setting, plan, _ in trials:
        asked = len(plan.benchmark.subjects) * len(plan.seeds)
        there = len(one[(one["label"] == setting.label) & (one["x"].eq(setting.x) | (setting.x is None))])
        if there < asked:
            place = "" if setting.x is None else f" at {setting.x:g}"
            missing.append(f"{setting.label}{place} ({asked - there} of {asked})")
    return f" Did not end, and in no mean: {', '.join(missing)}." if missing else ""


def tabulate(rows: Any) -> pd.DataFrame:
    """A row for each setting: means, and the bootstrap 95% interval of DINO and CLIP-T over subjects."""
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
    lines += _means(table, study.axis)
    if of_real is not None:
        lines += ["", f"Photographs with one another: DINO {of_real:.3f}."]
    lines += against_the_last(rows) if study.axis is None else _against_the_usual(rows, study)
    file = path.with_suffix(".md")
    write_text(file, "\n".join(lines) + "\n")
    return file


def _means(table: Any, axis: str | None) -> list[str]:
    place = [] if axis is None else [axis]
    head = ["", *place, "DINO", "CLIP-T", "distance"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in table.itertuples():
        cells = [str(row.label), *([f"{row.x:g}"] if place else [])]
        spread = "" if row.dino_sd is None or row.dino_sd != row.dino_sd else f" ± {row.dino_sd:.3f}"
        cells += [f"{row.dino:.3f} [{row.dino_low:.3f}, {row.dino_high:.3f}]{spread}", f"{row.clip_t:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{row.distance:.3g}'])} |")
    return lines


def _against_the_usual(rows: Any, study: Study) -> list[str]:
    usual = rows[rows["x"] == 1]
    beyond = [x for x in study.compared if (rows["x"] == x).any()]
    if usual.empty or not beyond:
        return []
    times = "rate" if "rate" in str(study.axis) else "steps"
    lines = ["", f"Against the usual {times}, paired by subject; of the distance how many times it is:", ""]
    lines += [f"| | | {' | '.join(f'{x:g} times' for x in beyond)} |", f"| --- | --- |{' ---: |' * len(beyond)}"]
    for label, of in rows.groupby("label", sort=False):
        at = {x: of[of["x"] == x] for x in (1, *beyond)}
        for score, name in (("dino", "DINO"), ("clip_t", "CLIP-T")):
            cells = [difference(at[x], at[1], score) for x in beyond]
            lines.append(f"| {label} | {name} | {' | '.join(cells)} |")
        lines.append(f"| {label} | distance | {' | '.join(ratio(at[x], at[1]) for x in beyond)} |")
    return lines


def against_the_last(rows: Any) -> list[str]:
    """Every row of a table against its last one, as lines of a caption."""
    *others, last = rows["label"].unique()
    if not others:
        return []
    of_last = rows[rows["label"] == last]
    lines = ["", f"Against {last}, paired by subject:", "", "| | DINO | CLIP-T |", "| --- | ---: | ---: |"]
    for label in others:
        of = rows[rows["label"] == label]
        lines.append(f"| {label} | {difference(of, of_last, 'dino')} | {difference(of, of_last, 'clip_t')} |")
    return lines


def difference(ours: Any, theirs: Any, score: str) -> str:
    """The paired difference of a score and its interval, as text; empty where no subject has both."""
    found = paired_differences(ours, theirs).get(score)
    return "" if found is None else f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def ratio(ours: Any, theirs: Any) -> str:
    """How many times as far, the geometric mean over subjects and its interval, as text."""
    of_ours, of_theirs = (np.log(rows.groupby("subject")["distance"].mean()) for rows in (ours, theirs))
    found = (of_ours - of_theirs).dropna().to_numpy()
    if not len(found):
        return ""
    low, high = bootstrap_interval(np.ones(len(found)), found)
    return f"{np.exp(found.mean()):.2f} [{np.exp(low):.2f}, {np.exp(high):.2f}]"


def write_pictures(path: Path, axis: str | None, trials: Sequence[Trial]) -> None:
    """The first picture of the benchmark's second prompt, of the first seed, by every setting.

    Along an axis it is that of the first subject; in a table a picture of every subject.
    """
    _, first, _ = trials[0]
    subjects = first.benchmark.subjects if axis is None else first.benchmark.subjects[:1]
    rows: dict[str, dict[str, Path]] = {}
    for setting, plan, _ in sorted(trials, key=lambda trial: trial[0].x or 0):
        for subject in subjects:
            folder = plan.place(subject, 0) / "pictures"
            if (folder / "metadata.jsonl").is_file():
                prompt = plan.benchmark.prompts_of(subject)[:2][-1]
                found = [picture for picture, said in read_generated(folder) if said == prompt]
                column = subject.name if setting.x is None else figures.place_name(setting.x)
                rows.setdefault(setting.label, {})[column] = found[0]
    order = {setting.label: rows[setting.label] for setting, _, _ in trials if setting.label in rows}
    columns = [s.name for s in subjects]
    if axis is not None:
        columns = [figures.place_name(x) for x in sorted({setting.x for setting, _, _ in trials if setting.x})]
    if order:
        prompts = list(dict.fromkeys(first.benchmark.prompts_of(subject)[:2][-1] for subject in subjects))
        figures.picture_rows(order, columns, axis, prompts[0] if len(prompts) == 1 else "", path)
