"""Pooling over seeds against numpy and scipy by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dgpo_core.evaluation.results import Key
from dgpo_core.evaluation.statistics import RESAMPLES, SEED
from dgpo_core.reporting.reproduction.seeds import Samples, combined, entry, pool

NAN = float("nan")


def keys(*sizes: int) -> list[Key]:
    return [(f"set{index}", str(number)) for index, size in enumerate(sizes) for number in range(size)]


def random_values(seeds: int, questions: int) -> NDArray[np.float64]:
    return np.random.default_rng(5).integers(0, 2, (seeds, questions)).astype(float)


def test_question_by_question_then_data_set_by_data_set() -> None:
    values = np.array([[1.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    pooled = pool(Samples(keys(2, 3), values))
    assert pooled.estimate.mean == pytest.approx(((1 + 0.5) / 2 + (1 + 0.5 + 0) / 3) / 2)
    assert pooled.seeds == pytest.approx([(0.5 + 2 / 3) / 2, (1 + 1 / 3) / 2])
    assert pooled.spread == pytest.approx(np.std(pooled.seeds, ddof=1))
    assert (pooled.estimate.n, pooled.failed) == (5, 0)


def test_interval_is_scipys_stratified_bootstrap_of_the_questions_means() -> None:
    values = random_values(3, 70)
    strata = [values[:, :40].mean(axis=0), values[:, 40:].mean(axis=0)]
    for confidence in (0.95, 0.99):
        expected = stats.bootstrap(
            strata,
            lambda a, b, axis: (a.mean(axis=axis) + b.mean(axis=axis)) / 2,
            n_resamples=RESAMPLES,
            batch=500,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        estimate = pool(Samples(keys(40, 30), values), confidence).estimate
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


def test_seeds_that_agree_do_not_make_the_questions_more() -> None:
    """Three identical seeds are one measurement: the interval must not shrink."""
    one = random_values(1, 50)
    three = np.repeat(one, 3, axis=0)
    assert pool(Samples(keys(50), three)).estimate == pool(Samples(keys(50), one)).estimate


def test_failed_episodes_are_left_out_seed_by_seed() -> None:
    values = np.array([[1.0, NAN, NAN, 0.0], [0.0, 1.0, NAN, 1.0]])
    pooled = pool(Samples(keys(4), values))
    assert pooled.estimate.mean == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert pooled.seeds == pytest.approx([0.5, 2 / 3])
    assert (pooled.estimate.n, pooled.failed) == (3, 3)


def test_data_set_with_nothing_but_failures_has_no_mean() -> None:
    values = np.array([[1.0, 1.0, NAN, NAN]])
    cell = entry(pool(Samples(keys(2, 2), values)), [4], 0.1)
    assert (cell["mean"], cell["ci95"], cell["seeds"], cell["n"]) == (None, [None, None], {"4": None}, 2)
    assert (cell["seed_sd"], cell["paper"], cell["failed"]) == (None, 0.1, 2)


def test_contrast_pairs_questions_and_seeds() -> None:
    first = Samples(keys(4), np.array([[1.0, 1.0, NAN, 0.0], [1.0, 0.0, 1.0, 0.0]]))
    second = Samples(list(reversed(keys(4)))[1:], np.array([[1.0, 0.0, 0.0], [0.0, 1.0, NAN]]))
    difference = combined([(1.0, first), (-2.0, second)])
    assert difference.keys == keys(4)[:3]
    expected = [[1.0 - 0.0, 1.0 - 0.0, NAN], [NAN, 0.0 - 2.0, 1.0 - 0.0]]
    np.testing.assert_allclose(difference.values, expected)
    pooled = pool(difference)
    assert pooled.estimate.mean == pytest.approx((1.0 + (1.0 - 2.0) / 2 + 1.0) / 3)
    assert pooled.seeds == pytest.approx([1.0, -0.5])
