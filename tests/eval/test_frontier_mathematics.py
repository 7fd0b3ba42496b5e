"""Envelopes, their bootstrap and the honest choice, against brute force and constructed examples."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from eval.study import envelope

SCORES = st.integers(0, 8).map(lambda value: value / 8)  # few values, so that ties are common


@st.composite
def points(draw):
    """Two arrays (P,)."""
    count = draw(st.integers(1, 9))
    return tuple(draw(arrays.arrays(float, count, elements=SCORES)) for _ in range(2))


def brute_force(x, y, at):
    """The envelope at one value, by its definition."""
    dominated = [
        any(x[j] >= x[i] and y[j] >= y[i] and (x[j] > x[i] or y[j] > y[i]) for j in range(len(x)))
        for i in range(len(x))
    ]
    front = sorted({(x[i], y[i]) for i in range(len(x)) if not dominated[i]})
    if at > front[-1][0]:
        return -np.inf
    for (left, upper), (right, lower) in itertools.pairwise(front):
        if left <= at <= right:
            return upper + (lower - upper) * (at - left) / (right - left)
    return front[0][1]


def value_at(x, y, at):
    return envelope.highest_y(x[None], y[None], np.array([[at]]))[0, 0]


@given(points(), st.integers(-8, 48).map(lambda value: value / 40))
def test_the_envelope_equals_its_definition(xy, at):
    assert value_at(*xy, at) == pytest.approx(brute_force(*xy, at), abs=1e-8)


@given(points())
def test_it_falls_and_no_point_is_above_it(xy):
    grid = np.linspace(-0.1, xy[0].max(), 40)
    values = envelope.highest_y(xy[0][None], xy[1][None], grid[None])[0]
    assert (np.diff(values) <= 1e-12).all()
    assert all(value_at(*xy, x) >= y - 1e-12 for x, y in zip(*xy))


@given(points(), st.randoms(), st.floats(0, 1), st.floats(0, 1))
def test_order_and_dominated_points_do_not_matter(xy, random, down, left):
    x, y = xy
    chosen = random.randrange(len(x))
    worse = np.append(x, x[chosen] - left), np.append(y, y[chosen] - down)
    order = list(range(len(x) + 1))
    random.shuffle(order)
    grid = np.linspace(-0.2, 1.2, 15)[None]
    changed = envelope.highest_y(worse[0][order][None], worse[1][order][None], grid)
    np.testing.assert_allclose(changed, envelope.highest_y(x[None], y[None], grid), atol=1e-12)


@given(points())
def test_rows_are_independent_and_one_of_equal_points_is_optimal(xy):
    x, y = (np.stack([a, a[::-1], np.full_like(a, a[0])]) for a in xy)
    together = envelope.is_optimal(x, y)
    assert all((envelope.is_optimal(a[None], b[None])[0] == row).all() for a, b, row in zip(x, y, together))
    assert together[2].sum() == 1
    assert set(zip(x[0][together[0]], y[0][together[0]])) == set(zip(x[1][together[1]], y[1][together[1]]))


def test_the_bootstrap_resamples_subjects_and_seeds_within_them():
    weights = envelope.bootstrap_weights(4, 3, 4000)
    np.testing.assert_allclose(weights[0], 1 / 12)
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), 1)
    np.testing.assert_allclose(weights[1:].sum(axis=2) * 4, np.round(weights[1:].sum(axis=2) * 4), atol=1e-12)
    random = np.random.default_rng(0)
    scores = 2 * random.normal(size=(4, 3)) + random.normal(size=(4, 1))
    means = envelope.weighted_means(weights, scores[None])[1:, 0]
    between, within = scores.mean(axis=1).var() / 4, scores.var(axis=1).mean() / 12
    assert means.var() == pytest.approx(between + within, rel=0.1), "the variance of a two-stage bootstrap"


def test_differences_are_paired():
    """A constant difference has an interval without width, however different the subjects are."""
    random = np.random.default_rng(0)
    scores = random.normal(size=(1, 6, 2))
    weights = envelope.bootstrap_weights(6, 2, 500)
    first, second = (envelope.weighted_means(weights, s)[:, 0] for s in (scores + 0.25, scores))
    assert envelope.estimate(first - second) == pytest.approx((0.25, 0.25, 0.25))
    assert envelope.estimate(first).high - envelope.estimate(first).low > 0.2


def test_an_estimate_may_not_be_reached():
    values = np.array([1.0, *[-np.inf] * 50, *[2.0] * 950])
    assert envelope.estimate(values) == (1.0, -np.inf, 2.0)


def test_the_winner_by_noise_does_not_win_on_other_subjects():
    """Among 200 equal points of much noise, the best mean on the choosing subjects is far too high."""
    random = np.random.default_rng(0)
    dino = 0.5 + 0.1 * random.normal(size=(200, 12, 1))
    clip_t = np.full_like(dino, 0.7)
    choice, _, judged = envelope.choose_and_judge(clip_t, dino, clip_t[0] - 0.01, envelope.alternate_folds(12))
    assert dino.mean(axis=(1, 2)).max() > 0.56
    assert judged.mean() == pytest.approx(0.5, abs=0.05) and np.isfinite(judged).all()
    for point, choosing in zip(choice.points, (slice(0, None, 2), slice(1, None, 2))):
        assert point == dino[:, choosing].mean(axis=(1, 2)).argmax()


def test_a_point_below_the_target_is_not_chosen():
    dino = np.array([0.9, 0.6, 0.1])[:, None, None] * np.ones((3, 4, 2))
    clip_t = np.array([0.5, 0.695, 0.7])[:, None, None] * np.ones((3, 4, 2))
    judging = [(np.array([0, 1]), np.array([2, 3]))]
    choice, judged_clip_t, judged = envelope.choose_and_judge(clip_t, dino, clip_t[2] - 0.01, judging)
    assert choice.points == [1] and choice.fold_of.tolist() == [-1, -1, 0, 0]
    assert np.isnan(judged[:2]).all() and (judged[2:] == 0.6).all() and (judged_clip_t[2:] == 0.695).all()
    with pytest.raises(ValueError, match="no point has enough x"):
        envelope.choose_and_judge(clip_t, dino, clip_t[2] + 1, judging)
