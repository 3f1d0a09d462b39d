"""Seeds as a sample: the t interval over them, and how many seeds and questions show an effect.

Every seed asks the same questions. The paired difference of seed s on question q is modelled as

    d(s, q) = effect + a(s) + b(q) + e(s, q)

with independent deviations of the seed, of the question, and of both together. The mean over S seeds and Q
questions then has the variance

    V = var(a)/S + var(b)/Q + var(e)/(S Q)

and the two-sided t test with S - 1 degrees of freedom has the power P(|T| > t(S - 1)), T noncentral t with
noncentrality effect / sqrt(V): crossed random factors (Westfall, Kenny and Judd, 2014, J. Exp. Psychol.
General 143), with the degrees of freedom of the seeds alone, which promises no power that there is not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dgpo_core.evaluation.statistics import CONFIDENCE

POWER = 0.8  # at which an effect counts as visible
MOST_QUESTIONS = 1_000_000  # beyond which no number of questions is given


def t_interval(means: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the t interval of the mean of the seeds' means; nan with a single seed, or one that has none."""
    from scipy import stats  # slow to import

    if len(means) < 2 or any(map(math.isnan, means)):
        return math.nan, math.nan
    centre, error = float(np.mean(means)), float(np.std(means, ddof=1)) / math.sqrt(len(means))
    half = float(stats.t.ppf((1 + confidence) / 2, len(means) - 1)) * error
    return centre - half, centre + half


@dataclass(frozen=True)
class Components:
    """An effect, and the variances of its deviations (the module's docstring)."""

    effect: float
    seeds: float  # var(a)
    questions: float  # var(b)
    both: float  # var(e)

    def variance(self, seeds: int, questions: float) -> float:
        """Return V, the variance of the mean over so many seeds and questions."""
        return self.seeds / seeds + self.questions / questions + self.both / (seeds * questions)

    def power(self, seeds: int, questions: float, confidence: float = CONFIDENCE) -> float:
        """Return the power of the two-sided t test over so many seeds, each on so many questions."""
        from scipy import stats

        variance, degrees = self.variance(seeds, questions), seeds - 1
        if variance == 0:
            return float(self.effect != 0)
        bound = stats.t.ppf((1 + confidence) / 2, degrees)
        shift = abs(self.effect) / math.sqrt(variance)
        # beyond 5 it is below 1e-8, and scipy gives nan for some
        wrong_side = stats.nct.cdf(-bound, degrees, shift) if shift < 5 else 0.0
        return float(stats.nct.sf(bound, degrees, shift) + wrong_side)

    def questions_needed(self, seeds: int, power: float = POWER) -> int | None:
        """Return the smallest number of questions with this power, or None where none is enough."""
        if self.power(seeds, MOST_QUESTIONS) < power:
            return None
        low, high = 0, MOST_QUESTIONS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(seeds, middle) >= power else (middle, high)
        return high


def components(strata: Sequence[NDArray[np.float64]]) -> Components | None:
    """Estimate effect and variances from paired differences [seeds, questions], an array a data set.

    By the mean squares of the two-way layout without replication, a negative variance being 0; data sets
    count alike. Questions that failed with a seed (nan) are left out. None with fewer than two seeds, or a
    data set with fewer than two questions.
    """
    whole = [values[:, ~np.isnan(values).any(axis=0)] for values in strata]
    if not whole or any(min(values.shape) < 2 for values in whole):
        return None
    by_question, residual, scale = [], [], []
    for values in whole:
        seeds, questions = values.shape
        over_seeds, over_questions = values.mean(axis=0), values.mean(axis=1, keepdims=True)
        rest = values - over_seeds - over_questions + values.mean()
        own = float((rest**2).sum() / ((seeds - 1) * (questions - 1)))
        by_question.append(max(0.0, float(over_seeds.var(ddof=1)) - own / seeds))
        residual.append(own)
        scale.append(own / questions)
    means = np.mean([values.mean(axis=1) for values in whole], axis=0)
    noise = float(np.sum(scale)) / len(whole) ** 2  # of a seed's mean, from its questions
    between = max(0.0, float(means.var(ddof=1)) - noise)
    return Components(float(means.mean()), between, float(np.mean(by_question)), float(np.mean(residual)))
