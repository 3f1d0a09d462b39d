"""Uncertainty of averages over questions (scipy's bootstrap, percentile method)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES, CONFIDENCE, SEED = 5000, 0.95, 0
MIN_APPLYING = 10  # questions of a rate, below which some bootstrap samples would have none


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; `low` and `high` are nan below two values."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Resampling:
    """How a bootstrap draws."""

    samples: int = RESAMPLES
    seed: int = SEED


DEFAULT = Resampling()


def mean_with_interval(values: ArrayLike, signed: bool = False, resampling: Resampling = DEFAULT) -> Estimate:
    """Average `values` (one a question), with a 95 % bootstrap interval.

    `signed`: they are differences of shares, not shares (see `_all_alike`).
    Raises ValueError for no values: an average over nothing is not 0.
    """
    return mean_of_means([values], signed=signed, resampling=resampling)


def mean_of_means(
    strata: Sequence[ArrayLike],
    confidence: float = CONFIDENCE,
    signed: bool = False,
    resampling: Resampling = DEFAULT,
) -> Estimate:
    """Average the strata's means (data sets count alike, whatever their size); `n` counts all values.

    The bootstrap is stratified: each stratum is resampled by itself. The interval is nan when a stratum has
    a single value. Raises ValueError for no strata or a stratum without values.
    """
    arrays: list[NDArray[np.float64]] = [np.asarray(values, dtype=np.float64) for values in strata]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("an average needs at least one value in each stratum")
    mean, n = float(_mean_of_means(*arrays, axis=-1)), sum(array.size for array in arrays)
    if any(array.size < 2 for array in arrays):
        return Estimate(mean, float("nan"), float("nan"), n)
    if np.ptp(np.concatenate(arrays)) == 0:
        return _all_alike(mean, n, confidence, signed)
    if all(np.ptp(array) == 0 for array in arrays):
        return Estimate(mean, mean, mean, n)
    low, high = _interval(arrays, _mean_of_means, confidence, resampling)
    return Estimate(mean, low, high, n)


def paired_difference(first: ArrayLike, second: ArrayLike, resampling: Resampling = DEFAULT) -> Estimate:
    """Average first - second over the same questions, with the paired bootstrap interval.

    Raises ValueError when the two differ in length.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same questions: {a.shape} against {b.shape}")
    return mean_with_interval(a - b, signed=True, resampling=resampling)


def unpaired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Subtract the averages over different questions; `n` counts all of them.

    The interval is nan where both have the same value for every question. Raises ValueError for no values.
    """
    samples = [np.asarray(values, dtype=np.float64) for values in (first, second)]
    if any(sample.size == 0 for sample in samples):
        raise ValueError("an average needs at least one value")
    mean, n = float(samples[0].mean() - samples[1].mean()), sum(sample.size for sample in samples)
    if any(sample.size < 2 for sample in samples) or all(np.ptp(sample) == 0 for sample in samples):
        return Estimate(mean, float("nan"), float("nan"), n)
    return Estimate(mean, *_interval(samples, _difference), n)


def rate_difference(first: ArrayLike, second: ArrayLike, resampling: Resampling = DEFAULT) -> Estimate:
    """Subtract two rates over the same questions, each over those that apply to it (not nan).

    As `share_difference`, of flags: a question applies once to a rate, or not at all.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    counted = [Occurrences(np.nan_to_num(flags), 1.0 - np.isnan(flags)) for flags in (a, b)]
    return share_difference(counted[0], counted[1], resampling)


@dataclass(frozen=True)
class Occurrences:
    """Counts something in questions, one entry of both arrays each: `events` among `occasions`."""

    events: NDArray[np.float64]
    occasions: NDArray[np.float64]

    @property
    def questions(self) -> int:
        """Return the number of questions with an occasion."""
        return int((self.occasions > 0).sum())


def share(counted: Occurrences, signed: bool = False, resampling: Resampling = DEFAULT) -> Estimate:
    """Divide all events by all occasions, of questions that are resampled whole.

    `n` counts those with an occasion; the interval is nan where they are few. `signed` as in
    `mean_with_interval`. Raises ValueError without any occasion.
    """
    applies = counted.occasions > 0
    events, occasions = counted.events[applies], counted.occasions[applies]
    if not applies.any():
        raise ValueError("a share needs at least one occasion")
    if (occasions == 1).all():
        return mean_with_interval(events, signed, resampling)
    value, n = float(events.sum() / occasions.sum()), counted.questions
    if value in (0, 1):
        return _all_alike(value, n, CONFIDENCE, signed)
    if n < MIN_APPLYING:
        return Estimate(value, float("nan"), float("nan"), n)
    zeros = np.zeros(n)
    low, high = _interval([events, occasions, zeros, zeros], _rates, resampling=resampling, paired=True)
    return Estimate(value, low, high, n)


def share_difference(first: Occurrences, second: Occurrences, resampling: Resampling = DEFAULT) -> Estimate:
    """Subtract two shares over the same questions.

    Whole questions are resampled, so that what both shares have in common they have in every sample. The
    interval is nan where one of them has few questions; `n` counts those with an occasion of one at least.

    Raises ValueError when the two differ in length or one of them has no occasion.
    """
    if first.occasions.shape != second.occasions.shape:
        lengths = f"{first.occasions.shape} against {second.occasions.shape}"
        raise ValueError(f"a paired test needs the same questions: {lengths}")
    fewest = min(first.questions, second.questions)
    if not fewest:
        raise ValueError("a rate needs at least one question")
    either = (first.occasions > 0) | (second.occasions > 0)
    parts = [first.events, first.occasions, second.events, second.occasions]
    samples = [part[either] for part in parts]
    mean, n = float(_rates(*samples, axis=-1)), int(either.sum())
    if n < 2 or fewest < MIN_APPLYING:
        return Estimate(mean, float("nan"), float("nan"), n)
    low, high = _interval(samples, _rates, resampling=resampling, paired=True)
    return Estimate(mean, low, high, n)


def _all_alike(value: float, n: int, confidence: float, signed: bool) -> Estimate:
    """Estimate `n` equal values, which a bootstrap would take for a law.

    Shares that were always 0 or always 1 get the exact binomial bound (Clopper and Pearson) on the other
    side, differences that were always 0 on both; for any other value there is none.
    """
    room = 1 - ((1 - confidence) / 2) ** (1 / n)
    low = value - room if value == 1 or (signed and value == 0) else value
    high = value + room if value == 0 else value
    return Estimate(value, low, high, n)


def _mean_of_means(*samples: NDArray[np.float64], axis: int) -> Any:
    return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)


def _difference(first: NDArray[np.float64], second: NDArray[np.float64], axis: int) -> Any:
    return first.mean(axis=axis) - second.mean(axis=axis)


def _rates(*parts: NDArray[np.float64], axis: int) -> Any:
    flagged, applying, others_flagged, others_applying = (part.sum(axis=axis) for part in parts)
    # a sample in which nothing applies (one in 20,000 with MIN_APPLYING questions) has rate 0
    return flagged / np.maximum(applying, 1) - others_flagged / np.maximum(others_applying, 1)


def _interval(
    samples: list[NDArray[np.float64]],
    statistic: Callable[..., Any],
    confidence: float = CONFIDENCE,
    resampling: Resampling = DEFAULT,
    paired: bool = False,
) -> tuple[float, float]:
    """Bootstrap `statistic` over independent or `paired` samples (percentile method), from a fixed seed."""
    from scipy import stats  # slow, and whoever only reads episodes comes by here

    result = stats.bootstrap(
        samples,
        statistic,
        paired=paired,
        vectorized=True,
        n_resamples=resampling.samples,
        batch=500,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(resampling.seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
