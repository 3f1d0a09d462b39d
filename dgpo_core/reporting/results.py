"""Tables of a run as plain dictionaries, ready for JSON."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgpo_core.arcap.diagnosis import Failure
from dgpo_core.protocol.episode import Outcome
from dgpo_core.reporting.inputs import CHECKS, Key, Measured, Row, Scores
from dgpo_core.scoring.statistics import Estimate, mean_of_means, mean_with_interval, paired_difference

Table = dict[str, Any]
# first minus second: what RL adds, what distillation adds, what is left to the teacher
PAIRS = (("dgpo", "kd"), ("kd", "student"), ("teacher", "dgpo"))
BEHAVIOUR = ("f1", "sub_em", "hit", "searches", "well_formed", "unanswered", "invalid", "cut", "model_tokens")
AVERAGE = "average"


def results(scores: Mapping[str, Scores], datasets: Sequence[str]) -> dict[str, Table]:
    """{model: {data set: {em, f1, sub_em, n, failed, ci95}, ..., "average": the same}}.

    The average is the mean over the data sets, its interval stratified by them; `n` counts the questions
    that did not fail. Without any such question in a data set, its means and the average are None.
    """
    return {model: _model_results(own, datasets) for model, own in scores.items()}


def _model_results(scores: Scores, datasets: Sequence[str]) -> Table:
    rows: Table = {}
    for dataset in [*datasets, AVERAGE]:
        strata = list(datasets) if dataset == AVERAGE else [dataset]
        em = _over(scores, "em", strata)
        row = {
            "em": em.mean,
            "f1": _mean(scores, "f1", strata),
            "sub_em": _mean(scores, "sub_em", strata),
            "n": em.n,
            "failed": sum(scores.failures(name) for name in strata),
            "ci95": [em.low, em.high],
        }
        rows[dataset] = rounded(row)
    return rows


def behaviour(scores: Mapping[str, Scores], datasets: Sequence[str]) -> dict[str, Table]:
    """{model: {quantity of BEHAVIOUR: {mean, ci95, n}}}, averaged over the data sets."""
    return {
        model: {name: _entry(_over(own, name, datasets)) for name in BEHAVIOUR}
        for model, own in scores.items()
    }


def comparisons(scores: Mapping[str, Scores]) -> dict[str, Table]:
    """{"dgpo-kd": {mean, ci95, n}, ...}: paired EM differences on the pooled questions.

    The pairs of PAIRS whose models both exist, or neighbours where no such pair does; only questions that
    failed for neither. Any other pair: `comparison.compare`.
    """
    em = {model: own.values["em"] for model, own in scores.items()}
    return {name: _paired(em[first], em[second]) for name, first, second in _pairs(em)}


def arcap(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Table]:
    """{model: {measurement: {mean, ci95, n, failed}}}, from each measurement's values and failures."""
    return {
        model: {
            name: _pooled(values.values[~values.failed]) | {"failed": int(values.failed.sum())}
            for name, values in own.items()
        }
        for model, own in measured.items()
    }


def arcap_comparisons(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, Table]]:
    """{"dgpo-kd": {measurement: {mean, ci95, n}}, ...}: paired differences on the same questions.

    As in `comparisons`; only measurements that both models have.
    """
    return {
        pair: {
            name: _paired(values.values, measured[second][name].values)
            for name, values in measured[first].items()
            if name in measured[second]
        }
        for pair, first, second in _pairs(measured)
    }


def diagnosis(diagnoses: Mapping[str, Mapping[Key, Row]], datasets: Sequence[str]) -> dict[str, Table]:
    """{model: {first_failures, by_dataset, hacking, failed}}; failed episodes count in `failed` alone.

    `first_failures` {failure: {mean, ci95, n}}: shares of the questions, averaged over the data sets; with
    the average EM they add up to 1. `by_dataset` {data set: {failure: number of questions}}.
    `hacking` {check: {mean, ci95, n}}: shares of the pooled questions that the check applies to.
    """
    return {model: _model_diagnosis(list(own.values()), datasets) for model, own in diagnoses.items()}


def _model_diagnosis(rows: list[Row], datasets: Sequence[str]) -> Table:
    counted = [row for row in rows if row["outcome"] != Outcome.FAILED]
    found = {name: [row["first_failure"] for row in counted if row["dataset"] == name] for name in datasets}
    shares = {
        str(failure): [
            np.array([each == failure for each in own], dtype=np.float64) for own in found.values()
        ]
        for failure in Failure
    }
    return {
        "first_failures": {name: _entry(_stratified(strata)) for name, strata in shares.items()},
        "by_dataset": {
            name: {str(failure): own.count(failure) for failure in Failure} for name, own in found.items()
        },
        "hacking": {
            check: _pooled(
                np.array([row[check] for row in counted if row[check] is not None], dtype=np.float64)
            )
            for check in CHECKS
        },
        "failed": len(rows) - len(counted),
    }


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def _pairs(models: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, first, second) of those of PAIRS that there are, else of each model and the one before it."""
    there = list(models)
    pairs = [(first, second) for first, second in PAIRS if first in there and second in there]
    pairs = pairs or [(second, first) for first, second in pairwise(there)]
    return [(f"{first}-{second}", first, second) for first, second in pairs]


def _paired(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Table:
    both = ~(np.isnan(ours) | np.isnan(theirs))  # nan: failed
    return _entry(paired_difference(ours[both], theirs[both]) if both.any() else NOTHING)


def _pooled(values: NDArray[np.float64]) -> Table:
    return _entry(mean_with_interval(values) if values.size else NOTHING)


def _over(scores: Scores, quantity: str, datasets: Sequence[str]) -> Estimate:
    return _stratified([scores.of(quantity, dataset) for dataset in datasets])


def _stratified(strata: Sequence[NDArray[np.float64]]) -> Estimate:
    if any(values.size == 0 for values in strata):
        return Estimate(math.nan, math.nan, math.nan, sum(values.size for values in strata))
    return mean_of_means(strata)


def _mean(scores: Scores, quantity: str, datasets: Sequence[str]) -> float:
    strata = [scores.of(quantity, dataset) for dataset in datasets]
    return float(np.mean([values.mean() if values.size else math.nan for values in strata]))


def _entry(estimate: Estimate) -> Table:
    interval = rounded([estimate.low, estimate.high])
    return {"mean": rounded(estimate.mean), "ci95": interval, "n": estimate.n}


def rounded(value: Any) -> Any:
    """Floats to 6 digits, nan and infinities to None (JSON has neither); lists and dictionaries in depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # + 0.0: no "-0.0"
    return value
