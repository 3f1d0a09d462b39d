"""Intervals against scipy's ways to them, the exact binomial one, and bootstraps written with numpy alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dgpo_core.evaluation.statistics import (
    Occurrences,
    Resampling,
    mean_of_means,
    mean_with_interval,
    paired_difference,
    rate_difference,
    share,
    share_difference,
    unpaired_difference,
)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=30).filter(lambda v: len(set(v)) > 1))
def test_scipy_finds_the_same_interval(values: list[float]) -> None:
    """With our seed, number of resamples and method; batches of resamples change nothing."""
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    )
    estimate = mean_with_interval(values)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(result.confidence_interval), abs=1e-12)


def test_interval_agrees_with_other_methods() -> None:
    """BCa (scipy) and the normal approximation, where the sample is large and not skewed."""
    values = (np.random.default_rng(3).random(2000) < 0.45).astype(float)
    estimate = mean_with_interval(values)
    bca = stats.bootstrap((values,), np.mean, n_resamples=2000, batch=200, rng=np.random.default_rng(1))
    normal = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    for interval in (tuple(bca.confidence_interval), normal):
        assert (estimate.low, estimate.high) == pytest.approx(interval, abs=0.003)


def test_paired_difference_is_scipys_paired_bootstrap() -> None:
    rng = np.random.default_rng(2)
    first, second = rng.random(80), rng.random(80)
    result = stats.bootstrap(
        (first, second),
        lambda a, b, axis=-1: (a - b).mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    estimate = paired_difference(first, second)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(result.confidence_interval), abs=1e-9)


def test_interval_covers_as_often_as_it_says() -> None:
    """Of the mean of 60 questions of which 0.4 are answered; 200 repetitions, so within 3 sigma of 0.95."""
    draws = (np.random.default_rng(11).random((200, 60)) < 0.4).astype(float)
    estimates = [mean_with_interval(row) for row in draws]
    covered = np.mean([estimate.low <= 0.4 <= estimate.high for estimate in estimates])
    assert covered == pytest.approx(0.95, abs=0.047)


def test_few_or_equal_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_with_interval([])
    single = mean_with_interval([0.5])
    assert single.mean == 0.5
    assert math.isnan(single.low)
    equal = mean_with_interval([0.5, 0.5])
    assert (equal.low, equal.high) == (0.5, 0.5)


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("n", [2, 30, 845])
def test_shares_without_exception_have_the_exact_binomial_interval(value: int, n: int) -> None:
    exact = stats.binomtest(value * n, n).proportion_ci(method="exact")
    whole = mean_with_interval([value] * n)
    assert (whole.low, whole.high) == pytest.approx((exact.low, exact.high))
    halves = mean_of_means([[value] * (n // 2), [value] * (n - n // 2)]) if n > 3 else whole
    assert (halves.low, halves.high) == pytest.approx((whole.low, whole.high))
    same = paired_difference([value] * n, [value] * n)
    room = stats.binomtest(0, n).proportion_ci(method="exact").high
    assert (same.mean, same.low, same.high) == pytest.approx((0, -room, room))


def test_paired_difference_pairs_the_questions() -> None:
    """Systems that differ on few questions: a paired interval is far narrower than an unpaired one."""
    rng = np.random.default_rng(0)
    first = (rng.random(400) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first)[:12]] = 0
    estimate = paired_difference(first, second)
    assert estimate.mean == pytest.approx(12 / 400)
    assert estimate.low > 0
    few = paired_difference(first[:5], first[:5][::-1].copy())
    assert few.low <= 0 <= few.high
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(first, second[:-1])


def test_mean_of_means_counts_sets_alike() -> None:
    rng = np.random.default_rng(5)
    small, large = (rng.random(50) < 0.9).astype(float), (rng.random(500) < 0.2).astype(float)
    estimate = mean_of_means([small, large])
    assert estimate.mean == pytest.approx((small.mean() + large.mean()) / 2)
    assert estimate.n == 550
    draws = np.random.default_rng(9)
    means = sum(v[draws.integers(0, len(v), (20_000, len(v)))].mean(1) for v in (small, large)) / 2
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)
    with pytest.raises(ValueError, match="each stratum"):
        mean_of_means([small, []])
    assert math.isnan(mean_of_means([small, [1.0]]).low)
    constant = mean_of_means([[1.0, 1.0], [0.0, 0.0, 0.0]])
    assert (constant.mean, constant.low, constant.high, constant.n) == (0.5, 0.5, 0.5, 5)
    with pytest.raises(ValueError, match="at least one value"):
        mean_of_means([])


def test_rate_difference_resamples_questions() -> None:
    """Against a bootstrap written out, with flags that apply to different questions."""
    rng = np.random.default_rng(4)
    first, second = (rng.random((2, 300)) < [[0.2], [0.1]]).astype(float)
    first[rng.random(300) < 0.6], second[rng.random(300) < 0.3] = np.nan, np.nan
    estimate = rate_difference(first, second)
    assert estimate.mean == pytest.approx(np.nanmean(first) - np.nanmean(second))
    draws = np.random.default_rng(1).integers(0, 300, (20_000, 300))
    samples = np.nanmean(first[draws], axis=1) - np.nanmean(second[draws], axis=1)
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(samples, [2.5, 97.5]), abs=0.01)


def test_rate_difference_of_few_or_no_questions() -> None:
    none, few = np.full(50, np.nan), np.where(np.arange(50) < 5, 1.0, np.nan)
    with pytest.raises(ValueError, match="at least one"):
        rate_difference(none, few)
    with pytest.raises(ValueError, match="same questions"):
        rate_difference(few, few[:9])
    assert math.isnan(rate_difference(few, np.zeros(50)).low)
    never = rate_difference(np.zeros(50), np.zeros(50))
    assert (never.mean, never.low, never.high) == (0, 0, 0)


def occurrences(seed: int, chance: float, questions: int = 300) -> Occurrences:
    rng = np.random.default_rng(seed)
    occasions = rng.integers(0, 4, questions)
    return Occurrences(rng.binomial(occasions, chance).astype(float), occasions.astype(float))


def test_shares_resample_questions_with_all_their_occasions() -> None:
    """Against a bootstrap written out; taking every occasion for a question of its own would be too sure."""
    first, second = occurrences(1, 0.4), occurrences(2, 0.3)
    draws = np.random.default_rng(1).integers(0, 300, (20_000, 300))
    samples = [each.events[draws].sum(1) / each.occasions[draws].sum(1) for each in (first, second)]
    found = share(first)
    assert (found.mean, found.n) == (first.events.sum() / first.occasions.sum(), (first.occasions > 0).sum())
    assert (found.low, found.high) == pytest.approx(np.percentile(samples[0], [2.5, 97.5]), abs=0.01)
    found = share_difference(first, second)
    assert (found.low, found.high) == pytest.approx(
        np.percentile(samples[0] - samples[1], [2.5, 97.5]), abs=0.01
    )
    alike = share_difference(first, first)
    assert (alike.mean, alike.low, alike.high) == (0, 0, 0)


def test_share_of_one_occasion_a_question_is_a_mean() -> None:
    values = (np.random.default_rng(3).random(100) < 0.4).astype(float)
    asked = np.where(np.arange(150) < 100, 1.0, 0.0)
    assert share(Occurrences(np.pad(values, (0, 50)), asked)) == mean_with_interval(values)


def test_shares_of_few_or_no_occasions() -> None:
    nothing, few = Occurrences(np.zeros(20), np.zeros(20)), Occurrences(np.ones(5), np.full(5, 2.0))
    with pytest.raises(ValueError, match="at least one"):
        share(nothing)
    with pytest.raises(ValueError, match="at least one"):
        share_difference(nothing, nothing)
    assert (share(few).mean, math.isnan(share(few).low)) == (0.5, True)
    never = share(Occurrences(np.zeros(20), np.full(20, 2.0)))
    exact = stats.binomtest(0, 20).proportion_ci(method="exact")
    assert (never.low, never.high) == pytest.approx((exact.low, exact.high))


def test_more_samples_and_another_seed_move_the_interval_little() -> None:
    values = (np.random.default_rng(3).random(200) < 0.3).astype(float)
    usual, other = mean_with_interval(values), mean_with_interval(values, resampling=Resampling(20_000, 5))
    assert (usual.low, usual.high) == pytest.approx((other.low, other.high), abs=0.01)
    assert usual != other


def test_unpaired_difference_agrees_with_welch() -> None:
    """Of many questions, as many of each kind or not."""
    rng = np.random.default_rng(4)
    first, second = (rng.random(900) < 0.6).astype(float), (rng.random(1500) < 0.5).astype(float)
    found = unpaired_difference(first, second)
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert found.mean == first.mean() - second.mean() and found.n == 2400
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high), abs=0.003)
    assert math.isnan(unpaired_difference([1.0, 1.0], [0.0, 0.0]).low)
    with pytest.raises(ValueError, match="at least one"):
        unpaired_difference([], [1.0])
