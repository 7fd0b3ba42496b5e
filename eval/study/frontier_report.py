"""From the numbers of the study ``frontier`` to its figures, its caption and its page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from delora_diffusers.atomic import write_text
from delora_diffusers.errors import InputError
from delora_diffusers.wording import counted
from eval.benchmark.tables import markdown
from eval.study import frontier_figure, frontier_page
from eval.study.envelope import Estimate
from eval.study.frontier_analysis import POINT, RESAMPLES, Analysis, Result, analyse
from eval.study.frontier_settings import BASE, CLIP_T_DROP, CLIP_T_LOSSES
from eval.study.frontier_words import in_words
from eval.study.saved_rows import read_rows

SHOWS = (
    "Subject fidelity (DINO) against prompt fidelity (CLIP-T): the frontier of every method over a grid of settings."
)
COLUMNS = (*POINT, "label", "subject", "seed", "dino", "clip_t", "drift", "real_dino", "thumbnail")
"""What the rows of the study have."""


class Table(NamedTuple):
    """A table of the caption and of the page; its first ``left`` columns are text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    left: int = 1


def read(file: Path) -> pd.DataFrame:
    """The rows of an earlier run.

    Raises:
        InputError: there are none, or none of the base model.
    """
    remedy = "run the study without --from_rows first"
    rows = read_rows(file, COLUMNS, remedy)
    if BASE not in set(rows["key"]):
        raise InputError(f"{file} has no rows of the base model; {remedy}.")
    return rows


def check_judges(judges: Sequence[str] | None, names: Sequence[str]) -> None:
    """Reject subjects that are not in the study, or that leave none to choose on.

    Raises:
        InputError
    """
    unknown = [name for name in judges or () if name not in names]
    if unknown:
        raise InputError(f"--judges {unknown[0]} is not a subject of the study, which has {', '.join(names)}.")
    if judges and not set(names) - set(judges):
        raise InputError("--judges names all subjects; leave some on which the settings are chosen.")


def write(path: Path, rows: pd.DataFrame, options: argparse.Namespace) -> Path:
    """The figures, the page and the caption: ``path`` with .png, .svg, .html and .md, and the small figure.

    Raises:
        InputError: see ``analyse``.
    """
    check_judges(options.judges, list(dict.fromkeys(rows["subject"])))
    drop = CLIP_T_DROP if options.clip_t_drop is None else options.clip_t_drop
    analysis = analyse(rows, drop, options.judges)
    frontier_figure.plot(analysis, path)
    frontier_figure.plot_small(analysis, path.with_name(f"{path.name}-small"))
    text = caption(analysis, path.name, drop, options.judges)
    frontier_page.write(path.with_suffix(".html"), analysis, path.with_name(f"{path.name}-images"), tables(analysis))
    file = path.with_suffix(".md")
    write_text(file, text)
    return file


def caption(analysis: Analysis, name: str, clip_t_drop: float, judges: Sequence[str] | None) -> str:
    """The caption with all numbers, as Markdown."""
    seeds, subjects = len(analysis.seeds), len(analysis.subjects)
    parts = [
        f"![{SHOWS}]({name}.png)\n",
        f"{SHOWS}\n",
        f"{counted(subjects, 'subject')}, {counted(seeds, 'seed')}. Each point is the mean of one setting at one "
        f"strength. {counts(analysis)} The base model is one more point of each, since it is every method at strength "
        "0. An envelope joins the Pareto-optimal points by straight lines; this interpolates, since strengths in "
        "between were not measured. In brackets: 95% bootstrap interval over subjects and seeds, with the same "
        f"{RESAMPLES:,} resamples for all "
        "methods; CLIP-T is relative to that of the base model in the same resample. The lower panels show the "
        f"difference from the envelope of {analysis.reference_label}.{excluded(analysis)}\n",
        f"Base model: CLIP-T {analysis.base:.3f}, DINO {analysis.base_dino:.3f}. Real images (intra-subject): DINO "
        f"{analysis.real_dino:.3f}. Methods are compared at a CLIP-T of {analysis.target:.3f}, {clip_t_drop:g} below "
        f"the base model. There the envelope of {analysis.reference_label} has DINO {analysis.level:.3f}.\n",
    ]
    for table in tables(analysis):
        parts += [f"{table.title}\n", markdown(table.header, table.rows, table.left)]
    if judges:
        parts.append(f"The subjects that judge are {', '.join(judges)}; the settings were chosen on the others.\n")
    return "\n".join(parts)


def counts(analysis: Analysis) -> str:
    """A sentence about the number of points of each method."""
    numbers = {result.scores.label: len(result.scores.points) - 1 for result in analysis.results}
    if len(set(numbers.values())) == 1:
        return f"Every method has {next(iter(numbers.values()))} points, so that none profits from more tries."
    return f"Points: {', '.join(f'{label} {number}' for label, number in numbers.items())}."


def excluded(analysis: Analysis) -> str:
    """A sentence about settings that are not complete; empty if all are."""
    if not analysis.incomplete:
        return ""
    missing = ", ".join(f"{label} {number}" for label, number in analysis.incomplete)
    return f" Left out, since a run of a subject or seed did not finish: {missing}."


def tables(analysis: Analysis) -> list[Table]:
    """The tables of the caption and of the page."""
    written = [envelope_table(analysis)]
    if len(analysis.results) > 1:
        written.append(loss_table(analysis))
    if analysis.results[0].judged:
        written.append(judged_table(analysis))
    return [*written, settings_table(analysis)]


def envelope_table(analysis: Analysis) -> Table:
    """DINO of each envelope at the target, CLIP-T at the reference's DINO, the differences from the reference, and the
    CLIP-T of the setting that follows prompts worst."""
    of = analysis.reference_label
    header = ["", f"DINO at CLIP-T {analysis.target:.3f}", f"minus {of}", f"CLIP-T at DINO {analysis.level:.3f}"]
    rows = [
        [
            result.scores.label,
            _text(result.at_target),
            _difference(analysis, result, result.difference),
            _text(result.reverse),
            _difference(analysis, result, result.reverse_difference),
            _number(float(result.scores.clip_t.mean(axis=(1, 2)).min())),
        ]
        for result in analysis.results
    ]
    title = "The envelopes at fixed prompt fidelity, and at fixed subject fidelity:"
    return Table(title, [*header, f"minus {of}", "lowest CLIP-T"], rows)


def loss_table(analysis: Analysis) -> Table:
    """The difference of each envelope from the reference's, where little and where much of CLIP-T is lost."""
    rows = [
        [result.scores.label, *(_text(difference, sign=True) for difference in result.at_losses)]
        for result in analysis.results
        if result.scores.key != analysis.reference
    ]
    title = f"DINO minus {analysis.reference_label}'s, where CLIP-T is this far below the base model's:"
    return Table(title, ["", *(f"{loss:g}" for loss in CLIP_T_LOSSES)], rows)


def judged_table(analysis: Analysis) -> Table:
    """The settings that were chosen on some subjects, scored on others."""
    of = analysis.reference_label
    names = ["DINO", "CLIP-T", *(["drift"] if analysis.has_drift else [])]
    rows = [
        [
            result.scores.label,
            "; ".join(result.chosen),
            *(_text(score) for score in result.judged[: len(names)]),
            *(_difference(analysis, result, score) for score in result.judged_difference),
        ]
        for result in analysis.results
    ]
    title = (
        "The setting of each method with the highest DINO among those that keep the target, chosen on some subjects "
        "and scored on others. An envelope picks the best of many noisy points and so is optimistic; this is not. The "
        "intervals do not include the choice:"
    )
    return Table(title, ["", "chosen", *names, f"DINO minus {of}", f"CLIP-T minus {of}"], rows, left=2)


def settings_table(analysis: Analysis) -> Table:
    """The Pareto-optimal settings of each method, of falling CLIP-T."""
    rows = []
    for result in analysis.results:
        scores = result.scores
        for point in result.optimal:
            record = scores.points.iloc[point]
            if record["key"] != BASE:
                means = [float(array[point].mean()) for array in (scores.dino, scores.clip_t, scores.drift)]
                rows.append([scores.label, in_words(record), *map(_number, means)])
    return Table("The Pareto-optimal settings:", ["", "setting", "DINO", "CLIP-T", "drift"], rows, left=2)


def _difference(analysis: Analysis, result: Result, score: Estimate) -> str:
    return "" if result.scores.key == analysis.reference else _text(score, sign=True)


def _number(value: float, sign: bool = False) -> str:
    if np.isnan(value):
        return "-"
    return "not reached" if np.isinf(value) else f"{value:+.3f}" if sign else f"{value:.3f}"


def _text(score: Estimate, sign: bool = False) -> str:
    """``0.686 [0.660, 0.710]``, with signs for differences."""
    value, low, high = (_number(v, sign) for v in score)
    return value if value == "not reached" else f"{value} [{low}, {high}]"
