"""Several seeds' answers to the same questions as one number with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgpo_core.reporting.reproduction.inputs import Samples
from dgpo_core.reporting.results import rounded
from dgpo_core.scoring.statistics import CONFIDENCE, Estimate, mean_of_means


@dataclass(frozen=True)
class Pooled:
    """The mean over data sets of the questions' means over seeds, and the mean of each seed by itself."""

    estimate: Estimate
    seeds: list[float]
    failed: int  # episodes left out, over all seeds

    @property
    def spread(self) -> float:
        """Standard deviation of the seeds' means; nan with a single seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else math.nan


def pool(samples: Samples, confidence: float = CONFIDENCE, signed: bool = False) -> Pooled:
    """Mean over the seeds question by question; interval over questions, stratified by data set.

    `signed`: the values are differences. A question counts with the seeds in which it did not fail. Mean and
    interval are nan where a data set has no such question.
    """
    names = list(dict.fromkeys(dataset for dataset, _ in samples.keys))
    strata = [samples.only(name).values for name in names]
    answered = [values[:, ~np.isnan(values).all(axis=0)] for values in strata]
    failed = int(np.isnan(samples.values).sum())
    if not names or any(values.shape[1] == 0 for values in answered):
        nothing = Estimate(math.nan, math.nan, math.nan, sum(values.shape[1] for values in answered))
        return Pooled(nothing, [math.nan] * samples.values.shape[0], failed)
    estimate = mean_of_means([np.nanmean(values, axis=0) for values in answered], confidence, signed)
    return Pooled(estimate, [_own_mean(samples, strata, seed) for seed in range(len(samples.values))], failed)


def _own_mean(samples: Samples, strata: Sequence[np.ndarray], seed: int) -> float:
    own = [values[seed][~np.isnan(values[seed])] for values in strata]
    return math.nan if any(values.size == 0 for values in own) else float(np.mean([v.mean() for v in own]))


def combined(terms: Sequence[tuple[float, Samples]]) -> Samples:
    """The weighted sum question by question and seed by seed; only questions that all terms have.

    A failure in one term is one in the sum: what is compared is always the same question of the same seed.
    """
    places = [{key: index for index, key in enumerate(samples.keys)} for _, samples in terms]
    keys = [key for key in terms[0][1].keys if all(key in place for place in places)]
    columns = [[place[key] for key in keys] for place in places]
    values = sum(
        weight * samples.values[:, own] for (weight, samples), own in zip(terms, columns, strict=True)
    )
    return Samples(keys, np.asarray(values, dtype=np.float64))


def entry(pooled: Pooled, seeds: Sequence[int], paper: float | None) -> dict[str, object]:
    """One cell of a table, ready for JSON."""
    estimate = pooled.estimate
    return {
        "mean": rounded(estimate.mean),
        "ci95": rounded([estimate.low, estimate.high]),
        "n": estimate.n,
        "failed": pooled.failed,
        "seeds": {str(seed): rounded(mean) for seed, mean in zip(seeds, pooled.seeds, strict=True)},
        "seed_sd": rounded(pooled.spread),
        "paper": rounded(paper),
    }
