"""The use of search of evaluated models: read and checked, and as tables of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_core.errors import UserError
from dgpo_core.evaluation import search_use as use
from dgpo_core.evaluation.results import NOTHING, Key, Row, Table, entry, pairs_of, read_rows, rounded
from dgpo_core.evaluation.statistics import (
    Estimate,
    Occurrences,
    paired_difference,
    share,
    share_difference,
)

_COUNT_COLUMNS = ("measurement", "dataset", "question_id", "events", "occasions", "failed")


@dataclass(frozen=True)
class Counted:
    """One count of a model's use of search: an entry a question, sorted; events are nan where failed."""

    keys: list[Key]
    events: NDArray[np.float64]
    occasions: NDArray[np.float64]

    def where(self, chosen: NDArray[np.bool_]) -> Occurrences:
        """Return the counts of the chosen questions."""
        return Occurrences(self.events[chosen], self.occasions[chosen])


def read_search_use(
    evaluation: Path, models: Sequence[str], keys: Sequence[Key]
) -> dict[str, dict[str, Counted]]:
    """Read every model's use of search in the questions `keys`.

    There is none of a model that was evaluated before this was counted. Raises UserError naming the file when
    one is malformed, and when two models were not asked the same questions.
    """
    found: dict[str, dict[str, Counted]] = {}
    for model in models:
        path = evaluation / model / "search_use.parquet"
        found[model] = _counted(path, set(keys)) if path.exists() else {}
        for name, own in found[model].items():
            first = next(other for other in found if name in found[other])
            if own.keys != found[first][name].keys:
                raise UserError(
                    f"{path}: {name}: not the questions that {first} was asked; evaluate both again"
                )
    return found


def _counted(path: Path, keys: set[Key]) -> dict[str, Counted]:
    rows: dict[str, dict[Key, Row]] = {name: {} for name in use.MEASUREMENTS}
    for row in read_rows(path, _COUNT_COLUMNS):
        name, key = row["measurement"], (row["dataset"], row["question_id"])
        if name not in rows:
            raise UserError(f"{path}: unknown measurement: {name}")
        if key in rows[name]:
            raise UserError(f"{path}: {name}: a question stands there twice")
        if key in keys:
            rows[name][key] = row
    found: dict[str, Counted] = {}
    for name, own in rows.items():
        if own:
            each = [own[key] for key in sorted(own)]
            events = np.array(
                [math.nan if row["failed"] else row["events"] for row in each], dtype=np.float64
            )
            occasions = np.array([row["occasions"] for row in each], dtype=np.float64)
            found[name] = Counted(sorted(own), events, occasions)
    return found


def search_use(counted: Mapping[str, Mapping[str, Counted]]) -> dict[str, Table]:
    """Return {model: {measurement: {mean, ci95, n, occasions, failed}}}: shares of all occasions."""
    return {model: {name: _share(name, each) for name, each in own.items()} for model, own in counted.items()}


def search_use_comparisons(counted: Mapping[str, Mapping[str, Counted]]) -> dict[str, dict[str, Table]]:
    """Return {"dgpo-kd": {measurement: {mean, ci95, n}}, ...}: as `arcap_comparisons`."""
    found: dict[str, dict[str, Table]] = {}
    for pair, first, second in pairs_of(counted):
        compared = compared_counts(counted[first], counted[second])
        found[pair] = {
            name: {"mean": row["difference"], "ci95": row["ci95"], "n": row["n"]}
            for name, row in compared.items()
        }
    return found


def _share(name: str, counted: Counted) -> Table:
    answered = ~np.isnan(counted.events)
    counts = counted.where(answered)
    estimate = share(counts, signed=name == use.OF_SEARCH) if counts.questions else NOTHING
    return entry(estimate) | {
        "occasions": int(counts.occasions.sum()),
        "failed": int((~answered).sum()),
    }


def compared_counts(ours: Mapping[str, Counted], theirs: Mapping[str, Counted]) -> dict[str, Row]:
    """Compare the shares of the measurements of both, over the questions that failed for neither."""
    return {name: _compared_share(own, theirs[name]) for name, own in ours.items() if name in theirs}


def _compared_share(ours: Counted, theirs: Counted) -> Row:
    both = ~(np.isnan(ours.events) | np.isnan(theirs.events))
    first, second = ours.where(both), theirs.where(both)
    means = [
        float(each.events.sum() / each.occasions.sum()) if each.questions else math.nan
        for each in (first, second)
    ]
    difference = NOTHING
    if first.questions and second.questions:
        is_mean = (first.occasions == 1).all() and (second.occasions == 1).all()
        difference = (
            paired_difference(first.events, second.events) if is_mean else share_difference(first, second)
        )
    return comparison_row(means[0], means[1], difference)


def comparison_row(ours: float, theirs: float, difference: Estimate) -> Row:
    """Return the row of two means and their difference (`comparison.compare`)."""
    values = {
        "first": ours,
        "second": theirs,
        "difference": difference.mean,
        "ci95": [difference.low, difference.high],
        "n": difference.n,
        "excludes_zero": difference.low > 0 or difference.high < 0,
    }
    result: Row = rounded(values)
    return result
