"""A model's evaluation as evidence: what it says, and how it was made, so that two can be compared.

A folder of evidence holds an evaluation's `questions`, `arcap` and `diagnosis` (Parquet) and `made.json`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.reporting.inputs import (
    Key,
    Measured,
    Row,
    Scores,
    read_arcap,
    read_diagnoses,
    read_rows,
    read_scores,
)

TABLES = ("questions.parquet", "arcap.parquet", "diagnosis.parquet")
MADE = "made.json"


@dataclass(frozen=True)
class Made:
    """How an evaluation was made.

    `model`: SHA-256 of the evaluated folder. `index`: the index's digest. `settings`: of the evaluation, by
    dotted key. `code`: DVC's hash of each source that it ran.
    """

    model: str
    index: str
    settings: dict[str, Any]
    code: dict[str, str]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Evidence:
    """What one model answered. `questions` identifies the asked questions with their golden answers."""

    made: Made
    questions: str
    scores: Scores
    arcap: dict[str, Measured]
    diagnoses: dict[Key, Row]


def read_evidence(folder: Path, datasets: Sequence[str]) -> Evidence:
    """Raises UserError naming the file that is missing, malformed or lacks a data set."""
    root, name = folder.parent, folder.name
    scores = read_scores(root, [name], datasets)[name]
    arcap = read_arcap(root, [name])[name]
    diagnoses = read_diagnoses(root, [name], scores.keys)[name]
    return Evidence(_made(folder / MADE), _questions(folder), scores, arcap, diagnoses)


def differences(ours: Evidence, theirs: Evidence) -> list[str]:
    """Why two evaluations cannot be compared; empty when they were made alike."""
    found = []
    if ours.questions != theirs.questions:
        found.append("they were asked other questions")
    if ours.made.index != theirs.made.index:
        found.append(f"they searched other indexes ({ours.made.index[:12]}, {theirs.made.index[:12]})")
    if ours.arcap.keys() != theirs.arcap.keys():
        found.append(f"only one was measured in {', '.join(sorted(ours.arcap.keys() ^ theirs.arcap.keys()))}")
    found += [
        f"{name} was measured on other questions"
        for name in sorted(ours.arcap.keys() & theirs.arcap.keys())
        if ours.arcap[name].question_ids != theirs.arcap[name].question_ids
    ]
    if unlike := _unlike(ours.made.settings, theirs.made.settings):
        found.append(f"they were evaluated with other settings: {'; '.join(unlike)}")
    code = [
        key for key in ours.made.code | theirs.made.code if _differs(ours.made.code, theirs.made.code, key)
    ]
    if code:
        found.append(f"they were evaluated by other code: {', '.join(sorted(code))}")
    return found


def _made(path: Path) -> Made:
    try:
        return Made(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the origin of an evaluation: {error}") from error


def _questions(folder: Path) -> str:
    rows = read_rows(folder / TABLES[0], ("dataset", "question_id", "question", "golden_answers"))
    asked = sorted([r["dataset"], r["question_id"], r["question"], r["golden_answers"]] for r in rows)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    keys = sorted(key for key in {**ours, **theirs} if _differs(ours, theirs, key))
    return [f"{key} {json.dumps(ours.get(key))}, {json.dumps(theirs.get(key))}" for key in keys]


def _differs(ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    return key not in ours or key not in theirs or bool(ours[key] != theirs[key])
