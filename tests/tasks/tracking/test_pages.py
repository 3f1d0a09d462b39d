"""What MLflow's pages say of our experiment, its runs and models."""

import json
from pathlib import Path

import httpx
import pytest

from tasks.tracking import pages
from tasks.tracking.pages import run_name, runs_address
from tasks.tracking.runs import connect
from tasks.tracking.store import EXPERIMENT


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({}, "tiny, seed 3"),
        ({"seed": "3"}, "tiny, seed 3"),
        ({"reinforce.beta": "0.05"}, "beta=0.05, seed 3"),
        ({"reinforce.steps": "2", "distill.steps": "9"}, "reinforce.steps=2, distill.steps=9, seed 3"),
        (
            {"recipes.distill.mine.start": "student", "recipes.distill.mine.keep": "all", "data.noise": "1"},
            "recipe mine, noise=1, seed 3",
        ),
        ({f"a.b{n}": str(n) for n in range(6)}, "b0=0, b1=1, b2=2, b3=3, 2 more, seed 3"),
        ({"questions.test": "x" * 99}, f"test={'x' * 24}, seed 3"),
    ],
)
def test_a_run_is_named_after_what_is_special(changed: dict[str, str], name: str) -> None:
    assert run_name("tiny", 3, changed) == name


def test_an_experiment_says_what_it_is_unless_somebody_has_said_so(workplace: Path) -> None:
    client = connect()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment and experiment.tags[pages.NOTE] == pages.EXPERIMENT_NOTE
    view = json.loads(experiment.tags["mlflow.sharedViewState.dgpo"])
    assert (
        view["searchFilter"] == "tags.kind = 'pipeline'"
        and "metrics.`em/dgpo/average`" in view["selectedColumns"]
    )
    client.set_experiment_tag(experiment.experiment_id, pages.NOTE, "ours")
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.dgpo", "older")
    experiment = connect().get_experiment(experiment.experiment_id)
    assert experiment.tags[pages.NOTE] == "ours"
    assert json.loads(experiment.tags["mlflow.sharedViewState.dgpo"]) == view
    client.set_experiment_tag(experiment.experiment_id, pages.NOTE, pages.EXPERIMENT_NOTE)


def test_the_runs_address_is_asked_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = [{"key": "mlflow.sharedViewState.dgpo", "value": "{}"}]
    answers: list[object] = [
        {"experiment": {"experiment_id": "7", "tags": tags}},
        {"experiment": {"experiment_id": "7", "tags": []}},
        {"error_code": "RESOURCE_DOES_NOT_EXIST"},
        ["no MLflow"],
    ]
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(200, json=answers.pop(0)))
    found = [runs_address("http://here") for _ in range(4)]
    assert found[0].startswith("http://here/#/experiments/7/runs?") and "viewStateShareKey=dgpo" in found[0]
    assert found[1:] == ["http://here"] * 3

    def away(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx, "get", away)
    assert runs_address("http://here") == "http://here"
