"""MLflow: what a stage leaves in a real sqlite store, and that a broken store is survived."""

import json
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.stage import stage
from tasks.tracking import PIPELINE_RUN, Pipeline, connect, flatten


def last_run_id() -> str:
    return str(json.loads(Path("runs/train/run.json").read_text())["mlflow_run"])


def test_run_holds_params_metrics_and_state(workplace: Path) -> None:
    with stage("train", config={"dgpo": {"beta": 0.5, "gate": [1, None]}, "name": "x"}) as run:
        for step in range(2500):  # more than one request may hold
            run.metrics(step, {"train/em": step / 2500, "loss": float("nan")})
        run.summary({"em": 0.75, "f1": numpy.float32(0.5)})
    client = connect()
    found = client.get_run(last_run_id())
    assert found.info.status == "FINISHED"
    assert found.data.params == {"dgpo.beta": "0.5", "dgpo.gate": "[1, null]", "name": "x"}
    assert found.data.tags["stage"] == "train"
    assert (found.data.metrics["em"], found.data.metrics["f1"]) == (0.75, 0.5)
    history = client.get_metric_history(found.info.run_id, "train/em")
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(2500))
    assert client.get_metric_history(found.info.run_id, "loss") == []


def test_stages_are_nested_under_the_pipeline(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline("pipeline")
    assert pipeline.run_id
    monkeypatch.setenv(PIPELINE_RUN, pipeline.run_id)
    with stage("train", config={}):
        pass
    pipeline.close(succeeded=True)
    client = connect()
    assert client.get_run(last_run_id()).data.tags["mlflow.parentRunId"] == pipeline.run_id
    assert client.get_run(pipeline.run_id).info.status == "FINISHED"


def test_pipeline_that_executed_nothing_leaves_no_run(workplace: Path) -> None:
    pipeline = Pipeline("pipeline")
    assert pipeline.run_id
    pipeline.close(succeeded=True)
    assert connect().get_run(pipeline.run_id).info.lifecycle_stage == "deleted"


def test_continued_stage_goes_on_in_the_same_run(workplace: Path) -> None:
    with pytest.raises(RuntimeError), stage("train", config={"a": 1}) as run:
        run.metrics(1, {"em": 0.1})
        raise RuntimeError
    first = last_run_id()
    assert connect().get_run(first).info.status == "FAILED"
    with stage("train", config={"a": 1}) as run:
        run.metrics(2, {"em": 0.2})
    assert last_run_id() == first
    found = connect().get_run(first)
    assert (found.info.status, found.data.metrics["em"]) == ("FINISHED", 0.2)
    with stage("train", config={"a": 1}):  # that one was complete: a new execution is a new run
        pass
    assert last_run_id() != first


def test_a_stage_waits_for_what_was_submitted(workplace: Path) -> None:
    with stage("train", config={}) as run:
        run.tracker.submit(lambda client, run_id: client.set_tag(run_id, "late", "yes"), patience=60)
    assert connect().get_run(last_run_id()).data.tags["late"] == "yes"


def test_broken_store_is_warned_of_once(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://nowhere")
    with stage("train", config={}, outputs=[Path("out")]) as run:
        run.metrics(1, {"em": 0.1})
        run.tracker.submit(lambda client, run_id: client.set_tag(run_id, "a", "b"))
        Path("out").touch()
    assert Path("out").exists()
    assert capsys.readouterr().err.count("warning: MLflow does not record") == 1


keys = st.text("abc", min_size=1, max_size=3)
trees = st.recursive(st.integers() | st.booleans(), lambda child: st.dictionaries(keys, child), max_leaves=9)


@given(st.dictionaries(keys, trees))
def test_flatten_keeps_every_leaf(values: dict[str, object]) -> None:
    def leaves(value: object) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    flat = flatten(values)
    assert len(flat) == leaves(values)
    for name in flat:
        node: object = values
        for key in name.split("."):
            assert isinstance(node, dict)
            node = node[key]
