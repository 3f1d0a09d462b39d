"""A working tree in which models were trained and evaluated, as DVC would leave it, with made-up figures."""

from pathlib import Path
from typing import Any

import yaml

from dgpo_core.config.params import load_params
from dgpo_core.retrieval.shards import Manifest, write_manifest
from tasks.project.dvc import dvc_md5
from tests.dgpo_core.evaluation.making import Model, write_evaluation
from tests.tasks.miniature import ROOT, change_params, make_project

PROMOTE = {"margin": 0.1, "arcap_margin": 0.1, "samples": 300, "min_questions": 50, "log_weights": False}
STUDENT = Model.of(0.02, seed=9)
KD = Model.of(0.5, seed=2)
BETTER, WORSE = Model.of(0.75, arcap=0.8, seed=3), Model.of(0.35, seed=3)


def make_trained(folder: Path, dgpo: Model = BETTER, **promote: Any) -> None:
    """Recipes kd and dgpo with models, evaluations and a dvc.lock in `folder`."""
    make_project(folder)
    change_params(folder, questions={"test": {}})
    change_params(
        folder, questions={"test": {"onehop": "nq", "hard": "bamboogle"}}, promote=PROMOTE | promote
    )
    (folder / "data/index").mkdir(parents=True)
    (folder / "data/corpus.jsonl").write_text('{"id": "1", "contents": "x"}\n')
    write_manifest(folder / "data/index", Manifest("c", KD.index, 1, 1.0, None, {}, []))
    (folder / "metrics").mkdir()
    (folder / "metrics/filter.json").write_text('{"raw": 40, "kept": 30}')
    write_evaluation(folder / "evaluation/student", STUDENT)
    train(folder, "kd", "kd's weights", KD)
    train(folder, "dgpo", "dgpo's weights", dgpo)


def train(folder: Path, recipe: str, weights: str, evaluated: Model, world: int = 0) -> None:
    """(Re)write a recipe's model, its evaluation on the questions of `world`, and dvc.lock."""
    model = folder / "models" / recipe
    model.mkdir(exist_ok=True)
    (model / "model.safetensors").write_text(weights)
    write_evaluation(folder / "evaluation" / recipe, evaluated, world=world)
    write_lock(folder)


def write_lock(folder: Path) -> None:
    """What DVC would write for the files that are there."""
    params = load_params(folder / "params.yaml").model_dump(mode="json")
    graph = {
        "data": (["tasks/stages/data.py"], ["data/corpus.jsonl"]),
        "index": (["data/corpus.jsonl"], ["data/index"]),
        "filter": (["tasks/stages/filter.py"], ["metrics/filter.json"]),
        "distill@kd": (["tasks/stages/distill.py", "data/index", "metrics/filter.json"], ["models/kd"]),
        "reinforce@dgpo": (["tasks/stages/reinforce.py", "data/index", "models/kd"], ["models/dgpo"]),
    }
    sections = ("evaluate", "protocol", "retrieval", "questions")
    for name in ("student", "kd", "dgpo"):
        deps = ["tasks/stages/evaluate.py", f"models/{name}", "data/index"]
        graph[f"evaluate@{name}"] = (deps, [f"evaluation/{name}"])
    stages = {
        name: {
            "cmd": f"exec python -m tasks.stages.{name.replace('@', ' ')}",
            "deps": [{"path": path, "md5": md5(folder, path)} for path in deps],
            "params": {"params.yaml": {key: params[key] for key in sections} | {"seed": params["seed"]}},
            "outs": [{"path": path, "md5": md5(folder, path)} for path in outs],
        }
        for name, (deps, outs) in graph.items()
        if all((folder / path).exists() for path in outs)
    }
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


def md5(folder: Path, path: str) -> str | None:
    return dvc_md5(ROOT / path if path.startswith("tasks/") else folder / path)
