"""A miniature project: the real stages and the committed base models on a world of 400 passages."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from dgpo_core.config.params import overlay, resolve_profile

ROOT = Path(__file__).resolve().parents[2]

MINIATURE: dict[str, dict[str, Any]] = {
    "world": {"passages": 400, "questions": {"train": 48, "dev": 8, "test": 8, "hard": 6}},
    "teach": {"questions": 40, "chunk": 40},
    "distill": {
        "epochs": 2,
        "batch_size": 16,
        "dev_questions": 8,
        "on_policy": {"steps": 2, "batch_size": 8, "dev_every": 1},
        "distillm": {"replay": 16, "tolerance": 0.0, "growth": 1.0},
    },
    "reinforce": {
        "steps": 4,
        "batch_size": 16,
        "mini_batch_size": 8,
        "dev_every": 2,
        "dev_questions": 8,
        "checkpoint_every": 1,
    },
    "protocol": {"max_turns": 2, "max_new_tokens": 60},
    "evaluate": {"questions": 4, "chunk": 64, "split_questions": 8},
    "promote": {"log_weights": False},
}
# a row that cuts the student and teaches it the corpus again
HEALED = {
    "start": "student",
    "objective": "kd",
    "episodes": "corpus",
    "layers": 3,
    "settings": {
        "epochs": 1,
        "batch_size": 8,
        "dev_questions": 2,
        "corpus": {"validation": 8, "dev_every": 5},
    },
}


def make_project(folder: Path, recipes: list[str] | None = None, **sections: dict[str, Any]) -> None:
    """Write a params.yaml of the tiny profile, made small, and link the models, into `folder`."""
    params = overlay(
        resolve_profile(ROOT / "profiles/tiny.yaml", recipes or ["kd", "dgpo"]), {**MINIATURE, **sections}
    )
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (folder / "models").mkdir()
    for name in ("student", "teacher"):
        (folder / "models" / name).symlink_to(ROOT / "models" / name)


def change_params(folder: Path = Path(), /, **sections: Any) -> None:
    """Lay other values over params.yaml in `folder`; an empty mapping replaces what is there."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(overlay(params, sections), sort_keys=False))


def run_of(stage: str, folder: Path = Path()) -> str:
    """MLflow's run of the stage's last execution."""
    return str(json.loads((folder / "runs" / stage / "run.json").read_text())["mlflow_run"])


def failure(stage: str) -> dict[str, Any]:
    """Why the stage failed, as the flow reads it."""
    found: dict[str, Any] = json.loads(Path(f".state/{stage}/failure.json").read_text())
    return found


def curves(name: str, folder: Path = Path()) -> list[dict[str, float]]:
    """What a training stage wrote for each step, without what the step lacks."""
    with (folder / "plots" / f"{name}.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def git(*arguments: str) -> str:
    """Run git as somebody; what it prints."""
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.strip()
