"""Scores over a grid of settings by subject, and what resampling the subjects does to their means."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from eval.benchmark.results import RESAMPLES


def by_setting(rows: pd.DataFrame, keys: Sequence[str], score: str) -> pd.DataFrame:
    """A score of each setting (the rows) and subject (the columns), its mean over seeds; NaN where none finished.

    Args:
        rows: one per setting, subject and seed. keys: the columns that tell settings apart.
    """
    return rows.pivot_table(index=list(keys), columns="subject", values=score, aggfunc="mean").sort_index()


def subject_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over subjects, (weights, settings); NaN for a setting none of whose subjects is in it.

    Args:
        values: (settings, subjects), NaN where a training did not finish; its subject does not count there.
        weights: (weights, subjects), how often each subject counts.
    """
    finished = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return weights @ np.where(finished, values, 0).T / (weights @ finished.T)


def resampled(count: int) -> np.ndarray:
    """How often each of ``count`` subjects is in each resample of a bootstrap, (resamples, subjects)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 95% percentile interval of values, of which some may be NaN."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
