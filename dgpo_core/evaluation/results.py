"""What the evaluation of models left behind: read and checked, and as tables of a run.

Tables are plain dictionaries, ready for JSON.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dgpo_core.agent.episode import Ending, Outcome
from dgpo_core.errors import UserError
from dgpo_core.evaluation.diagnosis import Failure
from dgpo_core.evaluation.statistics import (
    Estimate,
    mean_of_means,
    paired_difference,
    rate_difference,
    unpaired_difference,
)
from dgpo_core.files import parsed_json
from dgpo_core.tables import Only, read_table

MEASUREMENTS = (
    "source_em_nq",
    "source_em_nq_thinking",
    "source_em_musique",
    "source_em_musique_thinking",
    "query_hit_nq",
    "thinking_hit_nq",
    "thinking_searches_nq",
    "thinking_hit_musique",
    "thinking_searches_musique",
)

Row = dict[str, Any]
# how each reported quantity of a question follows from its row; shares are 0 or 1, searches a count
QUANTITIES: dict[str, Callable[[Row], float]] = {
    "em": lambda row: row["em"],
    "f1": lambda row: row["f1"],
    "sub_em": lambda row: row["sub_em"],
    "hit": lambda row: row["hit"],
    "searches": lambda row: row["searches"],
    "well_formed": lambda row: row["well_formed"],
    "unanswered": lambda row: row["prediction"] is None,
    "invalid": lambda row: row["invalid_actions"] > 0,
    "cut": lambda row: row["cut_turns"] > 0 or row["ending"] == Ending.LENGTH,
    "model_tokens": lambda row: row["model_tokens"],
}
_QUESTION_COLUMNS = (
    "dataset", "question_id", "question", "golden_answers", "prediction", "outcome", "em", "f1", "sub_em",
    "hit", "searches", "well_formed", "invalid_actions", "cut_turns", "ending", "model_tokens",
)  # fmt: skip
_ARCAP_COLUMNS = ("measurement", "question_id", "value", "failed")
SPLITS = ("train", "dev")
_SPLIT_COLUMNS = ("split", "em", "failed")
CHECKS = ("without_evidence", "repeats_question", "several_answers")  # for search-specific hacking
_DIAGNOSIS_COLUMNS = ("dataset", "question_id", "outcome", "first_failure", *CHECKS)


Key = tuple[str, str]  # (data set, question id)
EVERY: Mapping[str, int] = MappingProxyType({})  # question of every set
Table = dict[str, Any]
# first minus second: what RL adds to KD, and to KD of as many episodes; what the best variant adds;
# what KD adds; what is left to the teacher
PAIRS = (
    ("dgpo", "kd"),
    ("dgpo", "kd_long"),
    ("best", "dgpo"),
    ("best", "kd_long"),
    ("kd", "student"),
    ("teacher", "dgpo"),
    ("teacher", "best"),
)
BEHAVIOUR = ("f1", "sub_em", "hit", "searches", "well_formed", "unanswered", "invalid", "cut", "model_tokens")
AVERAGE = "average"
NOTHING = Estimate(math.nan, math.nan, math.nan, 0)
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]  # two models' values of the same questions


@dataclass(frozen=True)
class Scores:
    """One model's test questions, sorted by data set and id, whatever the order in the file.

    `failed` and each array of `values` have one entry a question; values are nan where failed.
    """

    keys: list[Key]
    failed: NDArray[np.bool_]
    values: dict[str, NDArray[np.float64]]

    def of(self, quantity: str, dataset: str) -> NDArray[np.float64]:
        """Return the values of one data set without failed questions; may be empty."""
        return self.values[quantity][self._in(dataset) & ~self.failed]

    def failures(self, dataset: str) -> int:
        """Count the failed questions of a data set."""
        return int((self._in(dataset) & self.failed).sum())

    def _in(self, dataset: str) -> NDArray[np.bool_]:
        return np.array([key[0] == dataset for key in self.keys], dtype=np.bool_)


def read_scores(
    evaluation: Path, models: Sequence[str], datasets: Sequence[str], first: Mapping[str, int] = EVERY
) -> dict[str, Scores]:
    """Read every model's test questions; of the sets in `first` only so many, in the file's order.

    Raises UserError naming the file when one is missing or malformed, and when the models were not asked
    the same questions: nothing could be compared then.
    """
    scores: dict[str, Scores] = {}
    for model in models:
        path = evaluation / model / "questions.parquet"
        scores[model] = _scores(path, datasets, first)
        if scores[model].keys != scores[models[0]].keys:
            raise UserError(f"{path}: not the questions that {models[0]} was asked; evaluate both again")
    return scores


def _scores(path: Path, datasets: Sequence[str], first: Mapping[str, int]) -> Scores:
    rows, places = [], Counter[str]()
    for row in read_rows(path, _QUESTION_COLUMNS):
        places[row["dataset"]] += 1
        if places[row["dataset"]] <= first.get(row["dataset"], places.total()):
            rows.append(row)
    order = {dataset: rank for rank, dataset in enumerate(datasets)}
    if unknown := {str(row["dataset"]) for row in rows} - set(order):
        raise UserError(f"{path}: data sets that this run does not know: {', '.join(sorted(unknown))}")
    if absent := set(order) - {row["dataset"] for row in rows}:
        raise UserError(f"{path}: no question of the data sets {', '.join(sorted(absent))}")
    rows.sort(key=lambda row: (order[row["dataset"]], row["question_id"]))
    keys = [(row["dataset"], row["question_id"]) for row in rows]
    if len(set(keys)) < len(keys):
        twice = next(a for a, b in pairwise(keys) if a == b)
        raise UserError(f"{path}: question {twice[1]} of {twice[0]} stands there twice")
    try:
        failed = np.array([Outcome(row["outcome"]) is Outcome.FAILED for row in rows], dtype=np.bool_)
    except ValueError as error:
        raise UserError(f"{path}: column outcome: {error}") from error
    values = {name: _quantity(path, rows, failed, name) for name in QUANTITIES}
    return Scores(keys, failed, values)


def _quantity(path: Path, rows: list[Row], failed: NDArray[np.bool_], name: str) -> NDArray[np.float64]:
    values = np.full(len(rows), np.nan)
    for index, row in enumerate(rows):
        if failed[index]:
            continue
        try:
            values[index] = float(QUANTITIES[name](row))
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: question {row['question_id']}: no value for {name}") from error
    if np.isnan(values[~failed]).any():
        raise UserError(f"{path}: nan for {name} in a question that did not fail")
    return values


@dataclass(frozen=True)
class Measurement:
    """One ARCap measurement of a model: an entry a question, sorted by id. Values are nan where failed."""

    question_ids: list[str]
    failed: NDArray[np.bool_]
    values: NDArray[np.float64]


def read_arcap(evaluation: Path, models: Sequence[str]) -> dict[str, dict[str, Measurement]]:
    """Read every model's measurements of ARCap; those that were not made are absent.

    Raises UserError naming the file when one is missing or malformed, and when two models were not asked the
    same questions in a measurement.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for model in models:
        path = evaluation / model / "arcap.parquet"
        found[model] = _measurements(path)
        for name, own in found[model].items():
            first = next(other for other in found if name in found[other])
            if own.question_ids != found[first][name].question_ids:
                raise UserError(
                    f"{path}: {name}: not the questions that {first} was asked; evaluate both again"
                )
    return found


def _measurements(path: Path) -> dict[str, Measurement]:
    rows = sorted(read_rows(path, _ARCAP_COLUMNS, may_be_empty=True), key=lambda row: str(row["question_id"]))
    if unknown := {str(row["measurement"]) for row in rows} - set(MEASUREMENTS):
        raise UserError(f"{path}: unknown measurements: {', '.join(sorted(unknown))}")
    found: dict[str, Measurement] = {}
    for name in MEASUREMENTS:
        mine = [row for row in rows if row["measurement"] == name]
        ids = [str(row["question_id"]) for row in mine]
        failed = np.array([row["failed"] for row in mine], dtype=np.bool_)
        values = np.array([row["value"] for row in mine], dtype=np.float64)
        if np.isnan(values[~failed]).any():
            raise UserError(f"{path}: {name}: a row without a value that did not fail")
        if len(set(ids)) < len(ids):
            raise UserError(f"{path}: {name}: a question stands there twice")
        if mine:
            found[name] = Measurement(ids, failed, np.where(failed, np.nan, values))
    return found


def read_diagnoses(evaluation: Path, models: Sequence[str], keys: Sequence[Key]) -> dict[str, dict[Key, Row]]:
    """Read every model's diagnoses of the test questions `keys`, in their order.

    Raises UserError naming the file when one is missing or malformed or is about other questions.
    """
    return {model: _diagnoses(evaluation / model / "diagnosis.parquet", keys) for model in models}


def _diagnoses(path: Path, keys: Sequence[Key]) -> dict[Key, Row]:
    rows = {(row["dataset"], row["question_id"]): row for row in read_rows(path, _DIAGNOSIS_COLUMNS)}
    if not set(rows) >= set(keys):
        raise UserError(f"{path}: not the questions of questions.parquet; evaluate again")
    for row in rows.values():
        failure = row["first_failure"]
        if (failure is not None) != (row["outcome"] == Outcome.WRONG):
            raise UserError(
                f"{path}: question {row['question_id']}: wrong answers alone have a first failure"
            )
        if failure is not None and failure not in list(Failure):
            raise UserError(f"{path}: question {row['question_id']}: unknown first failure {failure!r}")
    return {key: rows[key] for key in keys}


def read_rows(
    path: Path,
    columns: Sequence[str],
    only: Only | None = None,
    may_be_empty: bool = False,
) -> list[Row]:
    """Read `columns` of a Parquet file. Raises UserError when file, column or rows are missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if missing := set(columns) - set(pq.read_schema(path).names):
            raise UserError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
        rows: list[Row] = read_table(path, columns, only).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    if not rows and not may_be_empty:
        raise UserError(f"{path}: no rows")
    return rows


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """Read `<stage>.json` of every stage, by name. Raises UserError for anything but flat JSON objects."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {path.stem: _flat(path) for path in sorted(folder.glob("*.json"))}


def _flat(path: Path) -> dict[str, Any]:
    try:
        content = parsed_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict) or any(isinstance(value, dict | list) for value in content.values()):
        raise UserError(f"{path}: metrics are a flat JSON object of numbers and strings")
    return content


def results(scores: Mapping[str, Scores], datasets: Sequence[str]) -> dict[str, Table]:
    """Return {model: {data set: {em, f1, sub_em, n, failed, ci95}, ..., "average": the same}}.

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
    """Return {model: {quantity of BEHAVIOUR: {mean, ci95, n}}}, averaged over the data sets."""
    return {
        model: {name: entry(_over(own, name, datasets)) for name in BEHAVIOUR}
        for model, own in scores.items()
    }


def comparisons(scores: Mapping[str, Scores]) -> dict[str, Table]:
    """Return {"dgpo-kd": {mean, ci95, n, datasets: {data set: {mean, ci95, n}}}, ...}: paired EM differences.

    Their mean is that over the data sets, as the average EM is. The pairs of PAIRS whose models both exist,
    or neighbours where no such pair does; only questions that failed for neither. Any other pair:
    `comparison.compare`.
    """
    return {name: _em_difference(scores[a], scores[b]) for name, a, b in pairs_of(scores)}


def _em_difference(ours: Scores, theirs: Scores) -> Table:
    strata = {name: answered(pair) for name, pair in by_dataset(ours, theirs, "em").items()}
    sets = {name: entry(_difference([pair])) for name, pair in strata.items()}
    return entry(_difference(list(strata.values()))) | {"datasets": sets}


def by_dataset(ours: Scores, theirs: Scores, quantity: str) -> dict[str, Pair]:
    """Return each data set's values of two models that were asked the same questions."""
    of = np.array([dataset for dataset, _ in ours.keys])
    first, second = ours.values[quantity], theirs.values[quantity]
    return {name: (first[of == name], second[of == name]) for name in dict.fromkeys(of.tolist())}


def leaders(scores: Mapping[str, Scores], datasets: Sequence[str]) -> dict[str, str]:
    """Return {data set: model} where EM tells one of several models from all others, "average" included.

    Its EM is above 0, and no paired interval of its difference from another model includes 0.
    """
    found = {}
    for dataset in [*datasets, AVERAGE]:
        strata = list(datasets) if dataset == AVERAGE else [dataset]
        means = {model: _mean(own, "em", strata) for model, own in scores.items()}
        best = max(means, key=lambda model: np.nan_to_num(means[model]), default=None)
        if best is None or len(means) < 2 or not means[best] > 0:
            continue
        pairs = (by_dataset(scores[best], own, "em") for model, own in scores.items() if model != best)
        ahead = (_difference([answered(pair[name]) for name in strata]) for pair in pairs)
        if all(difference.low > 0 for difference in ahead):
            found[dataset] = best
    return found


def read_gaps(evaluation: Path, models: Sequence[str]) -> dict[str, Table]:
    """Return {model: {train, dev, gap: {mean, ci95, n}}}: greedy EM on training and validation questions.

    Only of models that were asked them (`splits.parquet`) and did not fail at all of one kind. Raises
    UserError for a malformed file.
    """
    found = {}
    for model in models:
        path = evaluation / model / "splits.parquet"
        rows = [row for row in read_rows(path, _SPLIT_COLUMNS) if not row["failed"]] if path.exists() else []
        em = {name: np.array([r["em"] for r in rows if r["split"] == name], float) for name in SPLITS}
        if all(values.size for values in em.values()):
            gap = unpaired_difference(*em.values())
            found[model] = {name: _pooled(values) for name, values in em.items()} | {"gap": entry(gap)}
    return found


def arcap(measured: Mapping[str, Mapping[str, Measurement]]) -> dict[str, Table]:
    """Return {model: {measurement: {mean, ci95, n, failed}}}, from each measurement's values and failures."""
    return {
        model: {
            name: _pooled(values.values[~values.failed]) | {"failed": int(values.failed.sum())}
            for name, values in own.items()
        }
        for model, own in measured.items()
    }


def arcap_comparisons(measured: Mapping[str, Mapping[str, Measurement]]) -> dict[str, dict[str, Table]]:
    """Return {"dgpo-kd": {measurement: {mean, ci95, n}}, ...}: paired differences on the same questions.

    As in `comparisons`; only measurements that both models have.
    """
    return {
        pair: {
            name: _paired(values.values, measured[second][name].values)
            for name, values in measured[first].items()
            if name in measured[second]
        }
        for pair, first, second in pairs_of(measured)
    }


def diagnosis(diagnoses: Mapping[str, Mapping[Key, Row]], datasets: Sequence[str]) -> dict[str, Table]:
    """Return {model: {first_failures, by_dataset, hacking, failed}}; failed episodes count in `failed` alone.

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
        "first_failures": {name: entry(_stratified(strata)) for name, strata in shares.items()},
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


def hacking_comparisons(diagnoses: Mapping[str, Mapping[Key, Row]]) -> dict[str, dict[str, Table]]:
    """Return {"dgpo-kd": {check: {mean, ci95, n}}, ...}: differences of the checks' shares.

    Of the same questions those that did not fail, each share over those that its check applies to; checks
    that apply to none of a model's are left out. Pairs as in `comparisons`.
    """
    flags = {
        model: {
            check: np.array([np.nan if row[check] is None else row[check] for row in own.values()], float)
            for check in CHECKS
        }
        for model, own in diagnoses.items()
    }
    return {
        pair: {
            check: entry(rate_difference(flags[first][check], flags[second][check]))
            for check in CHECKS
            if not (np.isnan(flags[first][check]).all() or np.isnan(flags[second][check]).all())
        }
        for pair, first, second in pairs_of(diagnoses)
    }


def pairs_of(models: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return (name, first, second) of the PAIRS that there are, else of each model and the one before it."""
    there = list(models)
    pairs = [(first, second) for first, second in PAIRS if first in there and second in there]
    pairs = pairs or [(second, first) for first, second in pairwise(there)]
    return [(f"{first}-{second}", first, second) for first, second in pairs]


def _paired(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Table:
    first, second = answered((ours, theirs))
    return entry(paired_difference(first, second) if first.size else NOTHING)


def _difference(strata: Sequence[Pair]) -> Estimate:
    """Average the strata's paired differences; NOTHING where a stratum has no answered question."""
    if not all(first.size for first, _ in strata):
        return NOTHING
    return mean_of_means([first - second for first, second in strata], signed=True)


def _pooled(values: NDArray[np.float64]) -> Table:
    return entry(_stratified([values]))


def _over(scores: Scores, quantity: str, datasets: Sequence[str]) -> Estimate:
    return _stratified([scores.of(quantity, dataset) for dataset in datasets])


def _stratified(strata: Sequence[NDArray[np.float64]]) -> Estimate:
    if any(values.size == 0 for values in strata):
        return replace(NOTHING, n=sum(values.size for values in strata))
    return mean_of_means(strata)


def _mean(scores: Scores, quantity: str, datasets: Sequence[str]) -> float:
    strata = [scores.of(quantity, dataset) for dataset in datasets]
    return float(np.mean([values.mean() if values.size else math.nan for values in strata]))


def entry(estimate: Estimate) -> Table:
    """Return an estimate as a table's entry."""
    interval = rounded([estimate.low, estimate.high])
    return {"mean": rounded(estimate.mean), "ci95": interval, "n": estimate.n}


def answered(pair: Pair) -> Pair:
    """Return the values of the questions that failed for neither."""
    first, second = pair
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


def rounded(value: Any) -> Any:
    """Round floats to 6 digits, in depth; nan and infinities, which JSON has not, become None."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) + 0.0 if math.isfinite(value) else None  # + 0.0: no "-0.0"
    return value
