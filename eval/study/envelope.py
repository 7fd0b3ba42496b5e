"""The upper envelope of points with two scores, its bootstrap, and a choice that is judged on other subjects.

Points are settings of a method; x and y are two scores, of both of which more is better. A point is Pareto-optimal if
no other is at least as good in both and better in one. The envelope joins the Pareto-optimal points by straight lines.
That is an interpolation: the settings in between, for example intermediate strengths, were not measured.

Letters in shapes: P points, S subjects, K seeds, B resamples.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray
ROUNDING = 1e-9
"""Sums of the same scores in another order differ by less; scores are of the order of 1."""


class Estimate(NamedTuple):
    """A value and its 95% interval. Minus infinity is a value that is not reached."""

    value: float
    low: float
    high: float


class Choice(NamedTuple):
    """What ``choose_and_judge`` chose: a point per fold, and the fold that judged each subject (-1 for none)."""

    points: list[int]
    fold_of: Array


def is_optimal(x: Array, y: Array) -> Array:
    """Which points are Pareto-optimal, in each row; of equal points only one.

    Args:
        x, y: (..., P), finite.
    """
    order = np.lexsort((-y, -x), axis=-1)  # x falls; of equal x the highest y comes first
    sorted_y = np.take_along_axis(y, order, axis=-1)
    before = np.maximum.accumulate(sorted_y, axis=-1)[..., :-1]
    first = np.ones_like(sorted_y[..., :1], dtype=bool)
    optimal = np.empty(x.shape, dtype=bool)
    np.put_along_axis(optimal, order, np.concatenate([first, sorted_y[..., 1:] > before], axis=-1), axis=-1)
    return optimal


def highest_y(x: Array, y: Array, at: Array) -> Array:
    """The y of the envelope where x is at least ``at``, for each row; minus infinity beyond the last point.

    Left of its first point the envelope is flat, since that point has enough x.

    Args:
        x, y: (B, P), finite. at: (B, Q).

    Returns:
        (B, Q).
    """
    values = np.empty(at.shape)
    for row, optimal in enumerate(is_optimal(x, y)):
        order = np.flatnonzero(optimal)[np.argsort(x[row][optimal])]
        values[row] = np.interp(at[row], x[row][order], y[row][order])
        values[row, at[row] > x[row].max() + ROUNDING] = -np.inf
    return values


def bootstrap_weights(subjects: int, seeds: int, resamples: int) -> Array:
    """The weight of each subject and seed in the mean, (1 + B, S, K).

    The first row is the sample itself, all weights equal. The others resample subjects and, within each chosen subject,
    its seeds, both with replacement.
    """
    random = np.random.default_rng(0)
    chosen = random.integers(subjects, size=(resamples, subjects, 1))
    chosen_seeds = random.integers(seeds, size=(resamples, subjects, seeds))
    weights = np.zeros((1 + resamples, subjects, seeds))
    np.add.at(weights, (np.arange(1, 1 + resamples)[:, None, None], chosen, chosen_seeds), 1.0)
    weights[0] = 1.0
    return weights / (subjects * seeds)


def weighted_means(weights: Array, scores: Array) -> Array:
    """The mean of each point in each resample, (1 + B, P).

    Args:
        weights: of ``bootstrap_weights``. scores: (P, S, K).
    """
    return np.einsum("bsk,psk->bp", weights, scores, optimize=True)


def estimate(values: Array) -> Estimate:
    """The first value, and the 95% percentile interval of the others.

    Args:
        values: (1 + B,), as computed from ``bootstrap_weights``.
    """
    low, high = band(values)
    return Estimate(float(values[0]), float(low), float(high))


def band(values: Array) -> tuple[Array, Array]:
    """95% percentile bounds of each column over the rows but the first, without the first axis.

    The quantiles are not interpolated, so that they are numbers also where some resamples do not get there.

    Args:
        values: (1 + B, ...).
    """
    ordered = np.sort(values[1:], axis=0)
    low, high = (math.ceil(quantile * len(ordered)) - 1 for quantile in (0.025, 0.975))
    return ordered[low], ordered[high]


def alternate_folds(subjects: int) -> list[tuple[Array, Array]]:
    """Two folds, (subjects that choose, subjects that judge): every second subject, and the other way round."""
    even, odd = np.arange(0, subjects, 2), np.arange(1, subjects, 2)
    return [(even, odd), (odd, even)]


def choose_and_judge(
    x: Array, y: Array, minimum: Array, folds: Sequence[tuple[Array, Array]]
) -> tuple[Choice, Array, Array]:
    """For each fold, the point with the highest y among those with enough x, judged on other subjects.

    The best of many noisy points looks better than it is on the subjects that it was chosen on. On others it does not.

    Args:
        x, y: (P, S, K). minimum: (S, K); x is enough if its mean over the choosing subjects is at least that of this.
        folds: (subjects that choose, subjects that judge).

    Returns:
        The choice, and the x and y of the chosen points on the subjects that judged, (S, K); NaN for other subjects.

    Raises:
        ValueError: no point has enough x; include one that always has, such as the base model.
    """
    points, fold_of = [], np.full(x.shape[1], -1)
    judged_x, judged_y = np.full(x.shape[1:], np.nan), np.full(x.shape[1:], np.nan)
    for fold, (choosing, judging) in enumerate(folds):
        mean_x, mean_y = x[:, choosing].mean(axis=(1, 2)), y[:, choosing].mean(axis=(1, 2))
        enough = mean_x >= minimum[choosing].mean()
        if not enough.any():
            raise ValueError("no point has enough x")
        best = int(np.argmax(np.where(enough, mean_y, -np.inf)))
        points.append(best)
        fold_of[judging] = fold
        judged_x[judging], judged_y[judging] = x[best][judging], y[best][judging]
    return Choice(points, fold_of), judged_x, judged_y
