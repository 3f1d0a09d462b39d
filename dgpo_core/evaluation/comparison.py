"""Two evaluated models, compared question by question."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import (
    EVERY,
    NOTHING,
    Pair,
    Row,
    Scores,
    answered,
    by_dataset,
    read_arcap,
    read_scores,
)
from dgpo_core.evaluation.search_use_tables import compared_counts, comparison_row, read_search_use
from dgpo_core.evaluation.statistics import mean_of_means

COMPARED = ("em", "f1")  # beside ARCap and the use of search


def compare(
    evaluation: Path,
    first: str,
    second: str,
    datasets: Sequence[str],
    asked: Mapping[str, int] = EVERY,
) -> dict[str, Any]:
    """Compare two models question by question.

    Returns {models, em and f1: {datasets: {name: row}, average: row}, arcap and search_use: {name: row}}. A
    row is {first, second, difference, ci95, n, excludes_zero}: means over the `n` questions that failed for
    neither, first - second with its paired 95 % interval, and whether that leaves 0 out. `average` is the
    mean over the data sets, as in the report. Of the data sets in `asked` only so many questions count; of
    ARCap's measurements and the use of search those of both models.

    Raises UserError for a model that was not evaluated, and for models that were asked different questions.
    """
    for model in (first, second):
        _require_evaluated(evaluation, model)
    scores = read_scores(evaluation, [first, second], datasets, asked)
    measured = read_arcap(evaluation, [first, second])
    counted = read_search_use(evaluation, [first, second], scores[first].keys)
    return {
        "models": [first, second],
        **{name: _compared_quantity(scores[first], scores[second], name) for name in COMPARED},
        "arcap": {
            name: _compared([(own.values, measured[second][name].values)])
            for name, own in measured[first].items()
            if name in measured[second]
        },
        "search_use": compared_counts(counted[first], counted[second]),
    }


def _require_evaluated(evaluation: Path, model: str) -> None:
    found = sorted(path.parent.name for path in evaluation.glob("*/questions.parquet"))
    if model not in found:
        there = f"evaluated are {', '.join(found)}" if found else "no model is"
        raise UserError(f"{evaluation / model}: {model!r} is not evaluated; {there}")


def _compared_quantity(ours: Scores, theirs: Scores, name: str) -> Row:
    strata = by_dataset(ours, theirs, name)
    return {
        "datasets": {dataset: _compared([pair]) for dataset, pair in strata.items()},
        "average": _compared(list(strata.values())),
    }


def _compared(strata: Sequence[Pair]) -> Row:
    """Compare the averages over strata; without an answered question in one of them there is none."""
    pairs = [answered(pair) for pair in strata]
    ours, theirs, difference = math.nan, math.nan, NOTHING
    if all(first.size for first, _ in pairs):
        ours, theirs = (float(np.mean([v.mean() for v in own])) for own in zip(*pairs, strict=True))
        difference = mean_of_means([first - second for first, second in pairs], signed=True)
    return comparison_row(ours, theirs, difference)
