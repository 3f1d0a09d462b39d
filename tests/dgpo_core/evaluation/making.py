"""Evaluations of made-up models with known strengths, on the same made-up questions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.agent.episode import write_episodes
from dgpo_core.config.params import PromoteConfig
from dgpo_core.evaluation.diagnosis import SCHEMA
from dgpo_core.evaluation.promotion import SETUP, Candidate, Evaluation, Setup, read_evaluation
from dgpo_core.evaluation.results import QUANTITIES, Measurement, Scores

DATASETS = ["onehop", "hard"]
MEASUREMENTS = ("source_em_nq", "query_hit_nq", "thinking_searches_nq")
CONFIG = PromoteConfig(margin=0.1, arcap_margin=0.1, samples=1000, min_questions=50)
INDEX = "1" * 64
SAME = 0.7  # share of the questions on which two models are right or wrong for the same reason


@dataclass
class Model:
    """What a made-up model does; `em` is its chance on a data set, and that of being right in ARCap."""

    em: Mapping[str, float]
    arcap: float = 0.6
    several_answers: float = 0.01
    failed: int = 0  # first so many questions of each data set
    seed: int = 1
    sha256: str = "a" * 64
    settings: dict[str, Any] = field(default_factory=lambda: {"protocol.max_turns": "4"})
    code: dict[str, str] = field(default_factory=lambda: {"tasks/stages/evaluate.py": "c0de"})
    index: str = INDEX

    @classmethod
    def of(cls, em: float, **others: Any) -> "Model":
        """Equally strong on both data sets."""
        return cls(dict.fromkeys(DATASETS, em), **others)

    @property
    def setup(self) -> Setup:
        return Setup(self.sha256, self.index, self.settings, self.code)


def right(model: Model, name: str, chance: float, questions: int, world: int) -> np.ndarray:
    """Which of the questions of `name` the model gets right; the questions' difficulty is the world's."""
    difficulty = np.random.default_rng([world, *name.encode()]).random(questions)
    own = np.random.default_rng([world, model.seed, *name.encode()])
    shared = own.random(questions) < SAME
    return np.where(shared, difficulty, own.random(questions)) < chance


def in_memory(model: Model, questions: int = 150, world: int = 0) -> Evaluation:
    """What `read_evaluation` would read."""
    keys = [(dataset, f"q{i:04d}") for dataset in DATASETS for i in range(questions)]
    correct = [right(model, name, model.em[name], questions, world) for name in DATASETS]
    failed = np.array([int(key[1:]) < model.failed for _, key in keys])
    em = np.where(failed, np.nan, np.concatenate(correct).astype(float))
    arcap = {}
    for name in MEASUREMENTS:
        values = right(model, name, model.arcap, questions, world).astype(float)
        arcap[name] = Measurement(
            [key for _, key in keys[:questions]], np.zeros(questions, dtype=np.bool_), values
        )
    flagged = np.random.default_rng([world, model.seed]).random(len(keys)) < model.several_answers
    diagnoses = {
        key: {
            "without_evidence": False if em[i] == 1 else None,
            "repeats_question": False,
            "several_answers": bool(flagged[i]),
        }
        for i, key in enumerate(keys)
    }
    return Evaluation(
        model.setup, "asked", Scores(keys, failed, dict.fromkeys(QUANTITIES, em)), arcap, diagnoses
    )


def write_evaluation(folder: Path, model: Model, questions: int = 150, world: int = 0) -> Path:
    """The files of the stage `evaluate`, with the same content."""
    evaluation = in_memory(model, questions, world)
    folder.mkdir(parents=True, exist_ok=True)
    rows, diagnoses = [], []
    for (dataset, name), em, failed in zip(
        evaluation.scores.keys, evaluation.scores.values["em"], evaluation.scores.failed, strict=True
    ):
        outcome = "failed" if failed else "correct" if em == 1 else "wrong"
        rows.append(_question(dataset, name, outcome))
        flags = dict.fromkeys(("without_evidence", "repeats_question", "several_answers"))
        flags = flags if failed else evaluation.diagnoses[dataset, name]
        first = "bad_query" if outcome == "wrong" else None
        same = {"dataset": dataset, "question_id": name, "outcome": outcome}
        diagnoses.append({**same, "first_failure": first, **flags})
    measured = [
        {"measurement": name, "question_id": each, "value": float(value), "failed": False}
        for name, own in evaluation.arcap.items()
        for each, value in zip(own.question_ids, own.values, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
    pq.write_table(pa.Table.from_pylist(measured), folder / "arcap.parquet")
    pq.write_table(pa.Table.from_pylist(diagnoses, schema=SCHEMA), folder / "diagnosis.parquet")
    write_episodes(folder / "episodes.parquet", [], {"index": model.index})
    return folder


def candidate(folder: Path, name: str, model: Model, questions: int = 150, world: int = 0) -> Candidate:
    """A model with its evaluation on disk."""
    write_evaluation(folder / name, model, questions, world)
    (folder / name / SETUP).write_text(model.setup.as_json())
    read_evaluation(folder / name, DATASETS)  # a mistake of this file shows here
    return Candidate(name, model.sha256, folder / name)


def _question(dataset: str, name: str, outcome: str) -> dict[str, Any]:
    right = outcome == "correct"
    return {
        "dataset": dataset,
        "question_id": name,
        "question": f"Who wrote {name}?",
        "golden_answers": ["Velmora"],
        "prediction": "Velmora" if right else "Tarn",
        "outcome": outcome,
        "em": right,
        "f1": float(right),
        "sub_em": right,
        "hit": right,
        "searches": 1,
        "generations": 2,
        "well_formed": True,
        "invalid_actions": 0,
        "cut_turns": 0,
        "ending": "answered",
        "model_tokens": 30,
    }
