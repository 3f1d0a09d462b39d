"""Tables of a run as plain dictionaries, ready for JSON: results, paired comparisons, behaviour, ARCap."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgpo_core.reporting.inputs import Scores
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

    Only pairs of PAIRS whose models both exist; only questions that failed for neither.
    """
    found: dict[str, Table] = {}
    for first, second in PAIRS:
        if first in scores and second in scores:
            both = ~(scores[first].failed | scores[second].failed)
            ours, theirs = (scores[model].values["em"][both] for model in (first, second))
            found[f"{first}-{second}"] = _entry(paired_difference(ours, theirs) if both.any() else NOTHING)
    return found


def arcap(measured: Mapping[str, Mapping[str, tuple[NDArray[np.float64], int]]]) -> dict[str, Table]:
    """{model: {measurement: {mean, ci95, n, failed}}}, from each measurement's values and failures."""
    return {
        model: {
            name: _entry(mean_with_interval(values) if values.size else NOTHING) | {"failed": failed}
            for name, (values, failed) in own.items()
        }
        for model, own in measured.items()
    }


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def _over(scores: Scores, quantity: str, datasets: Sequence[str]) -> Estimate:
    strata = [scores.of(quantity, dataset) for dataset in datasets]
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
