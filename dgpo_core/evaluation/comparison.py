"""Two models of a run compared question by question."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import EVERY, NOTHING, Scores, read_arcap, read_scores, rounded
from dgpo_core.evaluation.statistics import Estimate, mean_of_means, paired_difference

QUANTITIES = ("em", "f1")
Row = dict[str, Any]
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]  # both models' values of the same questions


def compare(
    evaluation: Path,
    first: str,
    second: str,
    datasets: Sequence[str],
    asked: Mapping[str, int] = EVERY,
) -> dict[str, Any]:
    """{models, em and f1: {datasets: {name: row}, average: row, pooled: row}, arcap: {name: row}}.

    A row is {first, second, difference, ci95, n, excludes_zero}: means over the `n` questions that failed
    for neither, first - second with its paired 95 % interval, and whether that leaves 0 out. `average` is
    the mean over the data sets, as in results.json; `pooled` is over all questions, as in comparisons.json.
    Of the data sets in `asked` only so many questions count; of ARCap's measurements those of both models.

    Raises UserError for a model that was not evaluated, and for models that were asked different questions.
    """
    for model in (first, second):
        _require_evaluated(evaluation, model)
    scores = read_scores(evaluation, [first, second], datasets, asked)
    measured = read_arcap(evaluation, [first, second])
    return {
        "models": [first, second],
        **{name: _quantity(scores[first], scores[second], name, datasets) for name in QUANTITIES},
        "arcap": {
            name: _pooled((own.values, measured[second][name].values))
            for name, own in measured[first].items()
            if name in measured[second]
        },
    }


def _require_evaluated(evaluation: Path, model: str) -> None:
    found = sorted(path.parent.name for path in evaluation.glob("*/questions.parquet"))
    if model not in found:
        there = f"evaluated are {', '.join(found)}" if found else "no model is"
        raise UserError(f"{evaluation / model}: {model!r} is not evaluated; {there}")


def _quantity(ours: Scores, theirs: Scores, name: str, datasets: Sequence[str]) -> Row:
    of = np.array([dataset for dataset, _ in ours.keys])
    first, second = ours.values[name], theirs.values[name]
    strata = {dataset: (first[of == dataset], second[of == dataset]) for dataset in datasets}
    return {
        "datasets": {dataset: _pooled(pair) for dataset, pair in strata.items()},
        "average": _averaged(list(strata.values())),
        "pooled": _pooled((first, second)),
    }


def _pooled(pair: Pair) -> Row:
    first, second = _answered(pair)
    if not first.size:
        return _row(np.nan, np.nan, NOTHING)
    return _row(first.mean(), second.mean(), paired_difference(first, second))


def _averaged(strata: Sequence[Pair]) -> Row:
    pairs = [_answered(pair) for pair in strata]
    if not all(first.size for first, _ in pairs):
        return _row(np.nan, np.nan, NOTHING)
    difference = mean_of_means([first - second for first, second in pairs], signed=True)
    ours, theirs = ([values.mean() for values in own] for own in zip(*pairs, strict=True))
    return _row(np.mean(ours), np.mean(theirs), difference)


def _answered(pair: Pair) -> Pair:
    """The questions that failed for neither."""
    first, second = pair
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


def _row(first: float | np.floating, second: float | np.floating, difference: Estimate) -> Row:
    values = {
        "first": float(first),
        "second": float(second),
        "difference": difference.mean,
        "ci95": [difference.low, difference.high],
        "n": difference.n,
        "excludes_zero": difference.low > 0 or difference.high < 0,
    }
    result: Row = rounded(values)
    return result
