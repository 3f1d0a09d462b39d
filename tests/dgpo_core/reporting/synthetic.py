"""A made-up run: what evaluation, training and audits leave behind, small and from a seed."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.agent.episode import Ending, Episode, Outcome, Search, write_episodes
from dgpo_core.evaluation import search_use
from dgpo_core.evaluation.diagnosis import SCHEMA, Failure
from dgpo_core.evaluation.results import EVERY, MEASUREMENTS
from dgpo_core.reporting.page import UNKNOWN, Origin, write_report
from dgpo_core.reporting.paper import DEFAULT_PAIR

MODELS = ["student", "teacher", "kd", "dgpo"]
MIRRORS = {
    "onehop": "nq",
    "twohop": "hotpotqa",
    "phrasing": "triviaqa",
    "rare": "popqa",
    "comparison": "2wikimultihopqa",
    "threehop": "musique",
    "hard": "bamboogle",
}
EM = {"student": 0.02, "teacher": 0.8, "kd": 0.45, "dgpo": 0.6}
HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \u2028"
Row = dict[str, Any]


@dataclass
class Run:
    """Folders of a run; change `rows`, `arcap`, `counts` or `diagnoses` before `save` for a special case."""

    folder: Path
    rows: dict[str, list[Row]] = field(default_factory=dict)  # of questions.parquet
    arcap: dict[str, list[Row]] = field(default_factory=dict)
    counts: dict[str, list[Row]] = field(default_factory=dict)  # of search_use.parquet
    diagnoses: dict[str, list[Row]] = field(default_factory=dict)
    params: Row = field(default_factory=dict)

    def save(self) -> None:
        for model, rows in self.rows.items():
            folder = self.folder / "evaluation" / model
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / "questions.parquet")
            pq.write_table(pa.Table.from_pylist(self.arcap[model]), folder / "arcap.parquet")
            pq.write_table(pa.Table.from_pylist(self.counts[model]), folder / "search_use.parquet")
            diagnoses = pa.Table.from_pylist(self.diagnoses[model], schema=SCHEMA)
            pq.write_table(diagnoses, folder / "diagnosis.parquet")
            if model in ("kd", "dgpo"):
                pq.write_table(pa.Table.from_pylist(_splits(model)), folder / "splits.parquet")
            write_episodes(folder / "episodes.parquet", [_episode(row) for row in rows])
        for name, content in _plots().items():
            path = self.folder / "plots" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        for name, values in _metrics().items():
            path = self.folder / "metrics" / f"{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values))

    def report(self, out: Path) -> Path:
        self.report_with(out)
        return out

    def report_with(
        self,
        out: Path,
        mirrors: Mapping[str, str | None] = MIRRORS,
        pair: str = DEFAULT_PAIR,
        first: Mapping[str, int] = EVERY,
        origin: Origin = UNKNOWN,
    ) -> None:
        evaluation, plots, metrics = (self.folder / name for name in ("evaluation", "plots", "metrics"))
        write_report(evaluation, plots, metrics, out, MODELS, mirrors, self.params, pair, first, origin)


def make_run(folder: Path, questions: int = 12) -> Run:
    """`questions` a data set; in each, the first of kd's and the second of dgpo's questions failed."""
    recipes = {"distill": {"kd": {"start": "student"}}, "reinforce": {"dgpo": {"start": "kd"}}}
    run = Run(folder, params={"seed": 1, "reinforce": {"beta": 0.001}, "recipes": recipes})
    for model in MODELS:
        rng = random.Random(model)
        run.rows[model] = [
            _row(rng, model, dataset, number) for dataset in MIRRORS for number in range(questions)
        ]
        run.diagnoses[model] = [_diagnosis(rng, row) for row in run.rows[model]]
        run.arcap[model] = [
            {
                "measurement": name,
                "question_id": f"q{number}",
                "value": float(rng.randint(0, 4)) if "searches" in name else float(rng.random() < EM[model]),
                "failed": number == 0,
            }
            for name in MEASUREMENTS
            for number in range(questions)
        ]
        run.counts[model] = [
            _count(rng, name, row) for name in search_use.MEASUREMENTS for row in run.rows[model]
        ]
    return run


def _splits(model: str) -> list[Row]:
    """KD knows 18 of 20 training questions and 10 of 20 others, DGPO 12 and 11; one has failed."""
    known = {"kd": {"train": 18, "dev": 10}, "dgpo": {"train": 12, "dev": 11}}[model]
    return [
        {"split": split, "dataset": "onehop", "question_id": f"{split}-{number}"}
        | {"em": number < count, "failed": number == 20}
        for split, count in known.items()
        for number in range(21)
    ]


def _count(rng: random.Random, name: str, row: Row) -> Row:
    occasions = 1 if name.startswith("em_") else rng.randint(0, 3)
    least = -1 if name == search_use.OF_SEARCH else 0
    return {
        "measurement": name,
        "dataset": row["dataset"],
        "question_id": row["question_id"],
        "events": rng.randint(least, occasions),
        "occasions": occasions,
        "failed": row["outcome"] == "failed",
    }


def _row(rng: random.Random, model: str, dataset: str, number: int) -> Row:
    failed = (model, number) in (("kd", 0), ("dgpo", 1))
    right = rng.random() < EM[model] and not failed
    prediction = "Velmora" if right else rng.choice(["Tarn", None, f"Ostrel {HOSTILE}"])
    return {
        "dataset": dataset,
        "question_id": f"{dataset}-{number}",
        "question": f"Where was the director of Silent Harbour {number} <b>born</b>?",
        "golden_answers": ["Velmora", "the city of Velmora"],
        "prediction": None if failed else prediction,
        "outcome": "failed" if failed else "correct" if right else "wrong",
        "em": right,
        "f1": 1.0 if right else rng.choice([0.0, 0.4]),
        "sub_em": right,
        "hit": right or rng.random() < 0.3,
        "searches": rng.randint(0, 4),
        "generations": 3,
        "well_formed": model != "student",
        "invalid_actions": rng.randint(0, 1),
        "cut_turns": 0,
        "ending": "failure" if failed else "answered" if prediction else "budget",
        "model_tokens": rng.randint(20, 60),
    }


def _diagnosis(rng: random.Random, row: Row) -> Row:
    wrong, failed = row["outcome"] == "wrong", row["outcome"] == "failed"
    return {
        "dataset": row["dataset"],
        "question_id": row["question_id"],
        "outcome": row["outcome"],
        "first_failure": str(rng.choice(list(Failure))) if wrong else None,
        "without_evidence": None if wrong or failed else rng.random() < 0.1,
        "repeats_question": None if failed or not row["searches"] else rng.random() < 0.2,
        "several_answers": None if failed else rng.random() < 0.1,
    }


def _episode(row: Row) -> Episode:
    documents = "".join(
        f"Doc {i}(Title: Silent Harbour) Silent Harbour is a film of 1987, directed by Ada Quill, a director "
        f"from Velmora who made {i + 3} films. {HOSTILE}\n"
        for i in (1, 2, 3)
    )
    response = (
        "<think> I need the director of the film first. </think><search> director of Silent Harbour </search>"
        f"\n\n<information>{documents}</information>\n\n<think> Ada Quill; now her place of birth. </think>"
        f"<search> Ada Quill born </search>\n\n<information>{documents}</information>\n\n"
        f"<think> Found it. </think><answer> {row['prediction']} </answer>"
    )
    searches = [
        Search(query, ["p17", "p3", "p1048"], [8.25, 7.5, 0.1])
        for query in ("director of Silent Harbour", "Ada Quill born")
    ]
    same = {
        name: row[name] for name in ("question_id", "dataset", "question", "golden_answers", "prediction")
    }
    counts = {
        name: row[name] for name in ("hit", "well_formed", "generations", "invalid_actions", "cut_turns")
    }
    return Episode(
        **same,
        **counts,
        sample=0,
        token_ids=[1, 2],
        owners=[0, 1],
        logprobs=[0.0, -0.5],
        response=response,
        outcome=Outcome(row["outcome"]),
        ending=Ending(row["ending"]),
        searches=searches,
        failure="retriever timed out" if row["outcome"] == "failed" else None,
    )


def _plots() -> dict[str, str]:
    rng = random.Random(0)
    distill = ["step,episodes,loss,ce,divergence,grad_norm,dev_em"]
    for step in range(1, 301):
        loss = 3 * math.exp(-step / 80) + 0.1 * rng.random()
        dev = 0.5 * (1 - math.exp(-step / 100)) if step % 50 == 0 else ""
        distill.append(f"{step},16,{loss:.4f},{loss * 0.6:.4f},{loss * 0.4:.4f},{1 + rng.random():.4f},{dev}")
    columns = (
        "em", "reward", "kl_inside", "response_tokens", "invalid_actions", "searches", "entropy",
        "clip_fraction", "explained_variance", "actor_grad_norm", "critic_grad_norm",
    )  # fmt: skip
    reinforce = [",".join(["step", "episodes", *columns, "dev_em"])]
    for step in range(1, 81):
        values = [f"{0.2 + step / 300 + 0.05 * rng.random():.4f}" for _ in columns]
        reinforce.append(",".join([str(step), "128", *values, "0.4" if step % 20 == 0 else ""]))
    return {
        "distill-kd.csv": "\n".join(distill) + "\n",
        "reinforce-dgpo.csv": "\n".join(reinforce) + "\n",
        "processor_time/distill-kd.csv": _seconds(300, 0.5),
        "processor_time/reinforce-dgpo.csv": _seconds(80, 6.0),
    }


def _seconds(steps: int, each: float) -> str:
    return "step,processor_seconds\n" + "".join(f"{step},{step * each}\n" for step in range(1, steps + 1))


def _metrics() -> dict[str, Row]:
    return {
        "teach": {"episodes": 2000, "correct": 1512, "share_correct": 0.756, "failed": 0},
        "filter": {"episodes": 2000, "kept": 1512, "dropped_wrong": 481, "dropped_no_answer": 7},
        "distill-kd": {"steps": 300, "dev_em": 0.47, "loss": 0.21},
        "reinforce-dgpo": {"steps": 80, "dev_em": 0.61, "wrong_share": 0.48, "note": HOSTILE},
    }
