"""What the evaluation, the training stages and the audits left behind, read and checked."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dgpo_core.arcap.diagnosis import Failure
from dgpo_core.errors import UserError
from dgpo_core.protocol.episode import Ending, Outcome

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
CHECKS = ("without_evidence", "repeats_question", "several_answers")  # for search-specific hacking
_DIAGNOSIS_COLUMNS = ("dataset", "question_id", "outcome", "first_failure", *CHECKS)


Key = tuple[str, str]  # (data set, question id)
EVERY: Mapping[str, int] = MappingProxyType({})  # question of every set


@dataclass(frozen=True)
class Scores:
    """One model's test questions, sorted by data set and id, whatever the order in the file.

    `failed` and each array of `values` have one entry a question; values are nan where failed.
    """

    keys: list[Key]
    failed: NDArray[np.bool_]
    values: dict[str, NDArray[np.float64]]

    def of(self, quantity: str, dataset: str) -> NDArray[np.float64]:
        """The values of one data set, failed questions left out; may be empty."""
        return self.values[quantity][self._in(dataset) & ~self.failed]

    def failures(self, dataset: str) -> int:
        return int((self._in(dataset) & self.failed).sum())

    def _in(self, dataset: str) -> NDArray[np.bool_]:
        return np.array([key[0] == dataset for key in self.keys], dtype=np.bool_)


def read_scores(
    evaluation: Path, models: Sequence[str], datasets: Sequence[str], first: Mapping[str, int] = EVERY
) -> dict[str, Scores]:
    """Every model's test questions; of the sets in `first` only so many, in the file's order.

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
class Measured:
    """One ARCap measurement of a model: an entry a question, sorted by id; values are nan where failed."""

    question_ids: list[str]
    failed: NDArray[np.bool_]
    values: NDArray[np.float64]


def read_arcap(evaluation: Path, models: Sequence[str]) -> dict[str, dict[str, Measured]]:
    """Every model's measurements; those that were not made are absent.

    Raises UserError naming the file when one is missing or malformed, and when two models were not asked the
    same questions in a measurement.
    """
    found: dict[str, dict[str, Measured]] = {}
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


def _measurements(path: Path) -> dict[str, Measured]:
    rows = sorted(read_rows(path, _ARCAP_COLUMNS), key=lambda row: str(row["question_id"]))
    if unknown := {str(row["measurement"]) for row in rows} - set(MEASUREMENTS):
        raise UserError(f"{path}: unknown measurements: {', '.join(sorted(unknown))}")
    found: dict[str, Measured] = {}
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
            found[name] = Measured(ids, failed, np.where(failed, np.nan, values))
    return found


def read_diagnoses(evaluation: Path, models: Sequence[str], keys: Sequence[Key]) -> dict[str, dict[Key, Row]]:
    """Every model's diagnoses of the test questions `keys`, in their order.

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


def read_rows(path: Path, columns: Sequence[str], filters: Any = None) -> list[Row]:
    """The rows of a Parquet file, `columns` only; raises UserError when file, column or rows are missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if missing := set(columns) - set(pq.read_schema(path).names):
            raise UserError(f"{path}: lacks the columns {', '.join(sorted(missing))}")
        rows: list[Row] = pq.read_table(path, columns=list(columns), filters=filters).to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def read_metrics(folder: Path) -> dict[str, dict[str, Any]]:
    """`<stage>.json` of every stage, by stage name; raises UserError for anything but flat JSON objects."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return {path.stem: _flat(path) for path in sorted(folder.glob("*.json"))}


def _flat(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}") from error
    if not isinstance(content, dict) or any(isinstance(value, dict | list) for value in content.values()):
        raise UserError(f"{path}: metrics are a flat JSON object of numbers and strings")
    return content
