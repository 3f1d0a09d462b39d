"""Made-up runs of several seeds: what evaluation and training leave behind, small and by hand."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.evaluation.results import MEASUREMENTS
from dgpo_core.reporting.paper import DEFAULT_PAIR
from dgpo_core.reporting.reproduction.report import pool_seeds
from dgpo_core.reporting.reproduction.seeds import RECORD, SeedRecord
from tests.dgpo_core.reporting.synthetic import MIRRORS

Row = dict[str, Any]
Value = Callable[[int, str, str, int], float]  # (seed, model, data set or measurement, number) -> value
MODELS = ["student", "teacher", "kd", "dgpo"]


@dataclass
class Runs:
    """Change `rows`, `arcap` or `curves` before `save` to make a special case."""

    folder: Path
    seeds: list[int]
    models: list[str]
    rows: dict[tuple[int, str], list[Row]] = field(default_factory=dict)
    arcap: dict[tuple[int, str], list[Row]] = field(default_factory=dict)
    curves: dict[tuple[int, str], str] = field(default_factory=dict)

    @property
    def roots(self) -> dict[int, Path]:
        return {seed: self.folder / f"seed-{seed}" for seed in self.seeds}

    def save(self) -> None:
        for seed, root in self.roots.items():
            (root / "plots").mkdir(parents=True, exist_ok=True)
            for model in self.models:
                folder = root / "evaluation" / model
                folder.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.Table.from_pylist(self.rows[seed, model]), folder / "questions.parquet")
                pq.write_table(pa.Table.from_pylist(self.arcap[seed, model]), folder / "arcap.parquet")
        for (seed, name), text in self.curves.items():
            (self.roots[seed] / "plots" / f"{name}.csv").write_text(text)

    def write(self, out: Path, **options: Any) -> Path:
        """Save the runs with their records, and write their report."""
        self.save()
        for seed, root in self.roots.items():
            (root / RECORD).write_text(record(seed, **({"models": self.models} | options)).model_dump_json())
        pool_seeds(self.roots.values(), out)
        return out


def record(seed: int, **other: Any) -> SeedRecord:
    fields = {"profile": "tiny", "commit": f"{seed}" * 40, "models": MODELS, "mirrors": MIRRORS}
    return SeedRecord.model_validate(fields | {"seed": seed, "pair": DEFAULT_PAIR, "first": {}} | other)


def make_runs(
    folder: Path, seeds: list[int], models: list[str], em: Value, arcap: Value, questions: int = 6
) -> Runs:
    """`questions` a data set and a measurement."""
    runs = Runs(folder, seeds, models)
    for seed in seeds:
        for model in models:
            runs.rows[seed, model] = [
                question(dataset, number, em(seed, model, dataset, number))
                for dataset in MIRRORS
                for number in range(questions)
            ]
            runs.arcap[seed, model] = [
                {
                    "measurement": name,
                    "question_id": f"q{number:04}",
                    "value": arcap(seed, model, name, number),
                    "failed": False,
                }
                for name in MEASUREMENTS
                for number in range(questions)
            ]
    return runs


def question(dataset: str, number: int, em: float) -> Row:
    return {
        "dataset": dataset,
        "question_id": f"{dataset}-{number:04}",
        "question": "Where was the director of Silent Harbour born?",
        "golden_answers": ["Velmora"],
        "prediction": "Velmora",
        "outcome": "correct" if em else "wrong",
        "em": em,
        "f1": em,
        "sub_em": em,
        "hit": bool(em),
        "searches": 1,
        "well_formed": True,
        "invalid_actions": 0,
        "cut_turns": 0,
        "ending": "answered",
        "model_tokens": 40,
    }


def coin(levels: dict[str, float]) -> Value:
    """1 with the model's probability, from a seed of its own."""

    def draw(seed: int, model: str, name: str, number: int) -> float:
        return float(random.Random(f"{seed} {model} {name} {number}").random() < levels[model])

    return draw


def curve(columns: dict[str, list[float | None]]) -> str:
    """CSV with the columns, steps from 1; None stays empty."""
    lines = [",".join(["step", *columns])]
    for step, values in enumerate(zip(*columns.values(), strict=True), 1):
        lines.append(",".join([str(step), *("" if value is None else f"{value}" for value in values)]))
    return "\n".join(lines) + "\n"
