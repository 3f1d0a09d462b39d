"""Uncertainty of averages over questions (scipy's bootstrap, percentile method)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES, CONFIDENCE, SEED = 5000, 0.95, 0


@dataclass(frozen=True)
class Estimate:
    """A mean with its confidence interval; `low` and `high` are nan below two values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_with_interval(values: ArrayLike) -> Estimate:
    """Mean of `values` (one a question) with a 95 % bootstrap interval.

    Raises ValueError for no values: an average over nothing is not 0.
    """
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("an average needs at least one value")
    mean = float(array.mean())
    if array.size < 2:
        return Estimate(mean, float("nan"), float("nan"), array.size)
    if np.ptp(array) == 0:
        return Estimate(mean, mean, mean, array.size)
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), array.size)


def paired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Mean of first - second over the same questions, with its paired bootstrap interval.

    Raises ValueError when the two differ in length.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired test needs the same questions: {a.shape} against {b.shape}")
    return mean_with_interval(a - b)
