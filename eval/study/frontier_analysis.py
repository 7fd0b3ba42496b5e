"""From the rows of the study ``frontier`` to its numbers: envelopes, bands, and the methods compared."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from delora_diffusers.errors import InputError
from eval.study import envelope
from eval.study.envelope import Array, Estimate
from eval.study.frontier_settings import BASE, CLIP_T_DROP, CLIP_T_LOSSES, REFERENCE
from eval.study.frontier_words import in_words

RESAMPLES, GRID = 2000, 200
POINT = ["key", "run", "strength"]
"""Columns that identify a point: a setting at a strength."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """The points of one method. Strength 0 of every method is the base model, which is the last point.

    Attributes:
        points: a row per point. dino, clip_t, drift: (P, S, K); drift may be NaN.
        tried: number of settings and strengths that were run, also if they are not complete.
    """

    key: str
    label: str
    points: pd.DataFrame
    dino: Array
    clip_t: Array
    drift: Array
    tried: int


class Line(NamedTuple):
    """An envelope on a grid, and its difference from the reference's envelope, each with its 95% band, (Q,) each."""

    value: Array
    low: Array
    high: Array
    difference: Array
    difference_low: Array
    difference_high: Array


@dataclasses.dataclass(frozen=True)
class Result:
    """What is reported about one method.

    Attributes:
        at_target, difference: DINO of the envelope at the target, and its difference from the reference's.
        at_losses: that difference at each of ``CLIP_T_LOSSES``.
        reverse, reverse_difference: CLIP-T at the DINO of the reference's envelope at the target, and the difference.
        judged: (DINO, CLIP-T, drift) of the settings that were chosen on other subjects, without drift if it was not
            measured; judged_difference: DINO and CLIP-T minus those of the reference; chosen: these settings. Empty
            with a single subject.
        fidelity: DINO on ``Analysis.grid``. drift: DINO on ``Analysis.drift_grid``; None if it was not measured.
        optimal: indices of the Pareto-optimal points, of falling CLIP-T.
    """

    scores: Scores
    at_target: Estimate
    difference: Estimate
    at_losses: list[Estimate]
    reverse: Estimate
    reverse_difference: Estimate
    judged: list[Estimate]
    judged_difference: list[Estimate]
    chosen: list[str]
    fidelity: Line
    drift: Line | None
    optimal: list[int]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All numbers of the study.

    Attributes:
        reference: key of the method that the others are compared with.
        base, target: CLIP-T of the base model, and the prompt fidelity at which methods are compared.
        base_dino, real_dino: DINO of the base model and of real images (intra-subject).
        level: the DINO of the reference's envelope at the target.
        grid, drift_grid: values of CLIP-T and of drift.
        incomplete: (label, number) of settings and strengths that miss a subject or seed.
    """

    results: list[Result]
    reference: str
    subjects: list[str]
    seeds: list[int]
    base: float
    base_dino: float
    real_dino: float
    target: float
    level: float
    grid: Array
    drift_grid: Array
    incomplete: list[tuple[str, int]]

    @property
    def has_drift(self) -> bool:
        return all(result.drift is not None for result in self.results)

    @property
    def reference_label(self) -> str:
        return next(result.scores.label for result in self.results if result.scores.key == self.reference)


def gather(rows: pd.DataFrame) -> tuple[Scores, list[Scores]]:
    """The scores of the base model, and of every method with the base model as last point. Points that miss a subject
    or a seed are left out, since a mean over the others would not be comparable.

    Raises:
        InputError: the base model misses some, or no setting is complete.
    """
    subjects, seeds = list(dict.fromkeys(rows["subject"])), sorted(set(rows["seed"]))
    columns = pd.MultiIndex.from_product([subjects, seeds])

    def array(of_method: pd.DataFrame, name: str) -> pd.DataFrame:
        wide = of_method.pivot(index=POINT, columns=["subject", "seed"], values=name)
        return wide.reindex(columns=columns).astype(float)

    def scores_of(key: str, of_method: pd.DataFrame) -> Scores:
        wide = {name: array(of_method, name) for name in ("dino", "clip_t", "drift")}
        complete = wide["dino"].notna().all(axis=1) & wide["clip_t"].notna().all(axis=1)
        points = of_method.drop_duplicates(POINT).set_index(POINT, drop=False)
        order = [index for index in points.index if complete[index]]
        shape = (len(order), len(subjects), len(seeds))
        arrays = {name: table.loc[order].to_numpy().reshape(shape) for name, table in wide.items()}
        return Scores(
            key, str(points["label"].iloc[0]), points.loc[order].reset_index(drop=True), **arrays, tried=len(points)
        )

    by_key: Any = rows.groupby("key", sort=False)
    base = scores_of(BASE, by_key.get_group(BASE))
    if not len(base.points):
        raise InputError("the base model has no images of some subjects; run the same command again.")
    methods = []
    for key, of_method in by_key:
        scores = scores_of(str(key), of_method)
        if key != BASE and len(scores.points):
            joined = {
                name: np.concatenate([getattr(scores, name), getattr(base, name)])
                for name in ("dino", "clip_t", "drift")
            }
            points = pd.concat([scores.points, base.points], ignore_index=True)
            methods.append(dataclasses.replace(scores, points=points, **joined))
        elif key != BASE:
            methods.append(scores)
    if not any(len(scores.points) > 1 for scores in methods):
        raise InputError("no setting is complete for all subjects and seeds; see the failures, and run it again.")
    return base, methods


def analyse(rows: pd.DataFrame, clip_t_drop: float = CLIP_T_DROP, judges: Sequence[str] | None = None) -> Analysis:
    """All numbers of the study.

    The bootstrap resamples subjects and, within them, seeds. All methods use the same resamples, and so does the base
    model, so differences are paired. CLIP-T is taken relative to the base model's in the same resample, because some
    subjects have a higher CLIP-T than others whatever the method.

    Args:
        rows: of ``frontier.score``.
        judges: subjects that judge the settings chosen on the others; by default every second subject judges the choice
            of the others, and the other way round.

    Raises:
        InputError: see ``gather``.
    """
    subjects, seeds = list(dict.fromkeys(rows["subject"])), sorted(set(rows["seed"]))
    base, methods = gather(rows)
    complete = [scores for scores in methods if len(scores.points)]
    weights = envelope.bootstrap_weights(len(subjects), len(seeds), RESAMPLES)
    has_drift = all(np.isfinite(scores.drift).all() for scores in complete)
    of_base = envelope.weighted_means(weights, base.clip_t)  # (1 + B, 1)
    x = {s.key: envelope.weighted_means(weights, s.clip_t) - of_base for s in complete}
    y = {s.key: envelope.weighted_means(weights, s.dino) for s in complete}
    drift = {s.key: envelope.weighted_means(weights, -s.drift) for s in complete} if has_drift else {}
    reference = REFERENCE if REFERENCE in x else complete[0].key
    at = np.full_like(of_base, -clip_t_drop)
    levels = envelope.highest_y(x[reference], y[reference], at)
    losses = np.tile(-np.array(CLIP_T_LOSSES), (len(of_base), 1))
    at_losses = {key: envelope.highest_y(x[key], y[key], losses) for key in x}
    of_reference = envelope.highest_y(y[reference], x[reference], levels)
    grid = np.linspace(min(x[key][0].min() for key in x), 0, GRID)
    drift_grid = np.linspace(0, max((-drift[key][0].min() for key in drift), default=1.0), GRID)
    lines = _lines(x, y, grid, reference)
    drift_lines = _lines(drift, y, -drift_grid, reference) if has_drift else {}
    judged = _judged(complete, base, clip_t_drop, [name in (judges or subjects) for name in subjects], weights)
    results = []
    for scores in complete:
        key = scores.key
        at_target = envelope.highest_y(x[key], y[key], at)
        reverse = envelope.highest_y(y[key], x[key], levels)
        optimal = np.flatnonzero(envelope.is_optimal(x[key][0], y[key][0]))
        results.append(
            Result(
                scores,
                envelope.estimate(at_target[:, 0]),
                envelope.estimate((at_target - levels)[:, 0]),
                [envelope.estimate(column) for column in (at_losses[key] - at_losses[reference]).T],
                envelope.estimate(reverse[:, 0] + of_base[0, 0]),
                envelope.estimate((reverse - of_reference)[:, 0]),
                *judged.get(key, ([], [], [])),
                fidelity=lines[key],
                drift=drift_lines.get(key),
                optimal=sorted(map(int, optimal), key=lambda point: -x[key][0, point]),
            )
        )
    real: Any = rows.groupby("subject")["real_dino"].first().mean()
    missing = [(s.label, s.tried - max(0, len(s.points) - 1)) for s in methods]
    base_clip_t = float(of_base[0, 0])
    return Analysis(
        results,
        reference,
        subjects,
        seeds,
        base_clip_t,
        float(base.dino.mean()),
        float(real),
        base_clip_t - clip_t_drop,
        float(levels[0, 0]),
        grid + base_clip_t,
        drift_grid,
        [(label, number) for label, number in missing if number],
    )


def _lines(x: dict[str, Array], y: dict[str, Array], grid: Array, reference: str) -> dict[str, Line]:
    """The envelope of each method on a grid, where the base model has an x of 0."""
    at = np.tile(grid, (len(y[reference]), 1))
    values = {key: envelope.highest_y(x[key], y[key], at) for key in x}
    return {
        key: Line(
            value[0],
            *envelope.band(value),
            (value - values[reference])[0],
            *envelope.band(value - values[reference]),
        )
        for key, value in values.items()
    }


def _judged(
    methods: Sequence[Scores], base: Scores, clip_t_drop: float, judging: Sequence[bool], weights: Array
) -> dict[str, tuple[list[Estimate], list[Estimate], list[str]]]:
    """By method, the last lines of ``Result``: what was chosen on some subjects, judged on others.

    Args:
        judging: which subjects judge those chosen on the others; if all do, every second one in turn.
    """
    count = len(judging)
    if count < 2:
        return {}
    folds = envelope.alternate_folds(count)
    if not all(judging):
        folds = [(np.flatnonzero(~np.array(judging)), np.flatnonzero(judging))]
        weights = envelope.bootstrap_weights(sum(judging), weights.shape[2], len(weights) - 1)

    def estimate(values: Array) -> Estimate:
        return envelope.estimate(envelope.weighted_means(weights, values[None, list(judging)])[:, 0])

    minimum = base.clip_t[0] - clip_t_drop
    choices, values = {}, {}
    for scores in methods:
        choice, clip_t, dino = envelope.choose_and_judge(scores.clip_t, scores.dino, minimum, folds)
        drift = np.full_like(dino, np.nan)
        for fold, point in enumerate(choice.points):
            drift[choice.fold_of == fold] = scores.drift[point][choice.fold_of == fold]
        choices[scores.key] = [in_words(scores.points.iloc[point]) for point in choice.points]
        values[scores.key] = [dino, clip_t, *([drift] if np.isfinite(scores.drift).all() else [])]
    reference = values[REFERENCE if REFERENCE in values else methods[0].key]
    return {
        key: (
            [estimate(score) for score in scores],
            [estimate(score - of_reference) for score, of_reference in zip(scores[:2], reference)],
            list(dict.fromkeys(choices[key])),
        )
        for key, scores in values.items()
    }
