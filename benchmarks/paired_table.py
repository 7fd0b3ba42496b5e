"""Tables of arms that were run on the same toys and seeds: means, and differences from a reference, with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval.benchmark.results import bootstrap_interval

CAPTION = "In brackets: 95% bootstrap intervals over toys; differences are paired by toy and seed."


def as_frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row per result with its arm, subject, seed (0 if it has none) and scores."""
    return pd.DataFrame(
        [{"arm": r["arm"], "subject": r["subject"], "seed": r["seed"] or 0, **r["scores"]} for r in results]
    )


def interval(values: pd.Series) -> tuple[float, float, float]:
    """The mean over subjects of their means over seeds, and its 95% bootstrap interval over subjects.

    Args:
        values: indexed by subject and seed.
    """
    by_subject = np.asarray(values.groupby("subject").mean(), float)
    return (float(by_subject.mean()), *bootstrap_interval(np.ones(len(by_subject)), by_subject))


def values_of(rows: pd.DataFrame, arm: str, score: str) -> pd.Series:
    """A score of an arm, indexed by subject and seed; empty if it was not measured."""
    indexed = rows[rows["arm"] == arm].set_index(["subject", "seed"])
    return indexed.get(score, pd.Series(dtype=float)).dropna()


def difference(rows: pd.DataFrame, arm: str, reference: str, score: str) -> pd.Series:
    """The differences from the reference (arm - reference) for the subjects and seeds that both have."""
    return (values_of(rows, arm, score) - values_of(rows, reference, score)).dropna()


def table(
    results: Sequence[dict[str, Any]],
    arms: Sequence[str],
    reference: str,
    compared: Sequence[str],
    titles: dict[str, str],
) -> str:
    """A row per arm with the means of its scores, and a row per compared arm with its differences from the reference.

    Args:
        results: each with arm, subject, seed and scores. titles: of the scores, by name.
    """
    rows = as_frame(results)
    lines = [f"| | {' | '.join(titles.values())} |", f"| --- |{' ---: |' * len(titles)}"]
    for arm in arms:
        lines.append(f"| {arm} | {' | '.join(_cell(values_of(rows, arm, score), '.3f') for score in titles)} |")
    lines += ["", f"| minus {reference} | {' | '.join(titles.values())} |", f"| --- |{' ---: |' * len(titles)}"]
    for arm in compared:
        cells = [_cell(difference(rows, arm, reference, score), "+.3f") for score in titles]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: pd.Series, number: str) -> str:
    """Mean and interval as text; empty without values."""
    if not len(values):
        return ""
    mean, low, high = (format(value, number) for value in interval(values))
    return f"{mean} [{low}, {high}]"
