"""Power and intervals over seeds against G*Power's figures, scipy's t test, and simulated experiments."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dgpo_core.evaluation.power import Components, components, t_interval


def simulated(
    rng: np.random.Generator, model: Components, seeds: int, questions: int, times: int = 1
) -> NDArray[np.float64]:
    """Differences [times, seeds, questions] that follow the model."""
    a = rng.normal(0, math.sqrt(model.seeds), (times, seeds, 1))
    b = rng.normal(0, math.sqrt(model.questions), (times, 1, questions))
    e = rng.normal(0, math.sqrt(model.both), (times, seeds, questions))
    return model.effect + a + b + e


@pytest.mark.parametrize(("effect", "seeds", "power"), [(0.5, 34, 0.8078), (1.0, 10, 0.8031)])
def test_power_is_that_of_published_tables(effect: float, seeds: int, power: float) -> None:
    """G*Power and R's power.t.test(type = "one.sample"), standard deviation 1."""
    assert Components(effect, 1.0, 0.0, 0.0).power(seeds, 1) == pytest.approx(power, abs=5e-5)
    assert Components(-effect, 0.0, 0.0, 1.0).power(seeds, 1) == pytest.approx(power, abs=5e-5)


def test_so_many_simulated_experiments_find_the_effect() -> None:
    model = Components(0.05, 0.001, 0.0, 0.09)
    means = simulated(np.random.default_rng(0), model, 5, 60, times=20_000).mean(axis=2)
    found = (stats.ttest_1samp(means, 0.0, axis=1).pvalue < 0.05).mean()
    assert model.power(5, 60) == pytest.approx(found, abs=0.012)  # over three standard errors


def test_the_mean_of_simulated_experiments_has_the_variance() -> None:
    model = Components(0.1, 0.002, 0.05, 0.1)
    means = simulated(np.random.default_rng(1), model, 4, 30, times=20_000).mean(axis=(1, 2))
    assert model.variance(4, 30) == pytest.approx(means.var(), rel=0.05)


def test_components_are_found_again() -> None:
    """In two data sets of different sizes and spreads, which count alike; a failed question is left out."""
    rng = np.random.default_rng(2)
    small = simulated(rng, Components(0.1, 0.0, 0.04, 0.05), 60, 300)[0]
    large = simulated(rng, Components(0.3, 0.0, 0.08, 0.15), 60, 600)[0]
    shift = rng.normal(0, 0.1, (60, 1))  # of a seed, in both
    small[3, 7] = math.nan
    found = components([small + shift, large + shift])
    assert found is not None
    assert found.effect == pytest.approx(0.2, abs=0.05)
    assert found.questions == pytest.approx(0.06, rel=0.15)
    assert found.both == pytest.approx(0.1, rel=0.05)
    assert found.seeds == pytest.approx(shift.var(ddof=1), rel=0.1)


def test_components_by_hand() -> None:
    """Means 2 and 0 of seeds, 2 and 0 of questions: residuals of 1, so mean squares 4 for both and 0 left."""
    found = components([np.array([[4.0, 0.0], [0.0, 0.0]])])
    assert found == Components(1.0, 0.0, 0.0, 4.0)


@pytest.mark.parametrize("values", [[[1.0, 0.0]], [[1.0], [0.0]], [[1.0, math.nan], [0.0, 1.0]]])
def test_no_components_of_one_seed_or_question(values: list[list[float]]) -> None:
    assert components([np.array(values)]) is None


def test_the_number_of_questions_is_the_first_that_is_enough() -> None:
    model = Components(0.05, 0.0005, 0.01, 0.1)
    needed = model.questions_needed(5)
    assert needed is not None
    assert model.power(5, needed) >= 0.8 > model.power(5, needed - 1)
    assert Components(0.05, 0.01, 0.01, 0.1).questions_needed(5) is None  # the seeds differ too much
    assert Components(0.0, 0.0, 0.0, 0.0).questions_needed(5) is None
    assert Components(1.0, 0.0, 0.0, 0.01).power(20, 500) == 1.0


def test_interval_over_seeds_is_scipys() -> None:
    means = [0.063, 0.042, 0.036]
    expected = stats.ttest_1samp(means, 0.0).confidence_interval(0.9)
    assert t_interval(means, 0.9) == pytest.approx((expected.low, expected.high))
    assert math.isnan(t_interval([0.1])[0]) and math.isnan(t_interval([0.1, math.nan])[1])
