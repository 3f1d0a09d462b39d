"""MLflow: what a stage leaves in a real sqlite store, and that a broken store is survived."""

import contextlib
import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.errors import InfrastructureError
from tasks.project.files import content_hash
from tasks.stages.stage import stage
from tasks.tracking.registry import store
from tasks.tracking.runs import PIPELINE_RUN, Pipeline, connect, flatten, start_run
from tests.tasks.miniature import run_of


def test_run_holds_params_metrics_and_state(workplace: Path) -> None:
    with stage("train", config={"dgpo": {"beta": 0.5, "gate": [1, None]}, "name": "x"}) as run:
        for step in range(2500):  # more than one request may hold
            run.metrics(step, {"train/em": step / 2500, "loss": float("nan")})
        run.summary({"em": 0.75, "f1": numpy.float32(0.5)})
    client = connect()
    found = client.get_run(run_of("train"))
    assert found.info.status == "FINISHED"
    assert found.data.params == {"dgpo.beta": "0.5", "dgpo.gate": "[1, null]", "name": "x"}
    assert found.data.tags["stage"] == "train"
    assert "profile" not in found.data.tags  # there is no params.yaml here
    assert (found.data.metrics["em"], found.data.metrics["f1"]) == (0.75, 0.5)
    history = client.get_metric_history(found.info.run_id, "train/em")
    assert [point.step for point in sorted(history, key=lambda point: point.step)] == list(range(2500))
    assert client.get_metric_history(found.info.run_id, "loss") == []


def opened(patch: pytest.MonkeyPatch) -> tuple[Pipeline, str]:
    """A pipeline whose stages follow, and its run."""
    pipeline = Pipeline("pipeline")
    assert pipeline.run_id
    patch.setenv(PIPELINE_RUN, pipeline.run_id)
    return pipeline, pipeline.run_id


def test_stages_are_nested_under_the_pipeline(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, run_id = opened(monkeypatch)
    with stage("train", config={}):
        pass
    pipeline.close(succeeded=True)
    client = connect()
    assert client.get_run(run_of("train")).data.tags["mlflow.parentRunId"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_pipeline_whose_stage_was_ended_has_not_failed(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, run_id = opened(monkeypatch)
    with pytest.raises(SystemExit), stage("train", config={}):
        raise SystemExit(143)  # as SIGTERM does
    pipeline.close(succeeded=False)
    assert connect().get_run(run_id).info.status == "KILLED"


def test_pipeline_that_executed_nothing_leaves_no_run(workplace: Path) -> None:
    pipeline = Pipeline("pipeline")
    assert pipeline.run_id
    pipeline.close(succeeded=True)
    assert connect().get_run(pipeline.run_id).info.lifecycle_stage == "deleted"


def test_continued_stage_goes_on_in_the_same_run(workplace: Path) -> None:
    with pytest.raises(RuntimeError), stage("train", config={"a": 1}) as run:
        run.metrics(1, {"em": 0.1})
        raise RuntimeError
    first = run_of("train")
    assert connect().get_run(first).info.status == "FAILED"
    with stage("train", config={"a": 1}) as run:
        run.metrics(2, {"em": 0.2})
    assert run_of("train") == first
    found = connect().get_run(first)
    assert (found.info.status, found.data.metrics["em"]) == ("FINISHED", 0.2)
    with stage("train", config={"a": 1}):  # that one was complete: a new execution is a new run
        pass
    assert run_of("train") != first


def test_a_stage_waits_for_what_was_submitted(workplace: Path) -> None:
    with stage("train", config={}) as run:
        run.tracker.submit(lambda client, run_id: client.set_tag(run_id, "late", "yes"), patience=60)
    assert connect().get_run(run_of("train")).data.tags["late"] == "yes"


def test_inputs_are_data_sets_with_their_digests(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("data/corpus.jsonl", "models/student/weights", "other.txt"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path)
    md5 = "0123456789abcdef0123456789abcdef"
    outs = [{"path": "data/corpus.jsonl", "md5": md5}, {"path": "models/student", "md5": f"{md5}.dir"}]
    Path("dvc.lock").write_text(json.dumps({"stages": {"data": {"cmd": "x", "outs": outs}}}))
    inputs = [Path("data/corpus.jsonl"), Path("models/student"), Path("other.txt")]

    def logged(name: str) -> dict[str, tuple[str, str]]:
        for _ in range(2):  # the second time it continues, and its inputs are still the same three
            with pytest.raises(RuntimeError), stage(name, config={}, inputs=inputs):
                raise RuntimeError
        inputs_of_run = connect().get_run(run_of(name)).inputs
        assert inputs_of_run
        found = inputs_of_run.dataset_inputs
        assert len(found) == 3
        assert all(json.loads(each.dataset.source)["uri"].startswith("file:///") for each in found)
        return {each.dataset.name: (each.dataset.digest, each.tags[0].value) for each in found}

    sha = content_hash(Path("data/corpus.jsonl"))
    assert logged("index")["data/corpus.jsonl"] == (sha[:36], "training")  # by hand: the file as it is
    monkeypatch.setenv("DVC_STAGE", "evaluate@student")
    assert logged("evaluate@student") == {
        "data/corpus.jsonl": (md5, "evaluation"),
        "models/student": (f"{md5}.dir", "model"),
        "other.txt": (content_hash(Path("other.txt"))[:36], "evaluation"),
    }


def test_curves_are_copied_and_large_outputs_only_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.tracking.runs.MAX_COPY", 20)
    with stage("train", config={}, outputs=[Path("models/kd"), Path("plots/kd.csv"), Path("reports")]):
        for path, text in {
            "models/kd/weights": "x" * 1000,
            "models/kd/tokenizer": "y" * 10,
            "plots/kd.csv": "step,loss",
            "reports/results.json": "{}",
            "reports/index.html": "z" * 21,
        }.items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
    client, run = connect(), run_of("train")
    files = {
        folder: {f.path for f in client.list_artifacts(run, folder)} for folder in ("", "plots", "reports")
    }
    assert files == {
        "": {"outputs.json", "plots", "reports"},
        "plots": {"plots/kd.csv"},
        "reports": {"reports/results.json"},
    }
    pointers = json.loads(Path(client.download_artifacts(run, "outputs.json")).read_text())
    assert pointers["models/kd"] == {"sha256": content_hash(Path("models/kd")), "bytes": 1010, "files": 2}
    assert pointers["reports"]["files"] == 2


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_machine_is_sampled_unless_mlflows_variable_says_no(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, enabled: str
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    if enabled == "false":  # it is on by default
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", enabled)
    with stage("train", config={}) as run:
        time.sleep(0.6)
        run.metrics(1, {"em": 0.1})
    metrics = connect().get_run(run_of("train")).data.metrics
    assert ("system/cpu_utilization_percentage" in metrics) == (enabled == "true")
    assert metrics["em"] == 0.1
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


def test_a_stage_ends_while_the_machine_is_sampled_rarely(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "600")
    with stage("train", config={}):
        pass
    started = time.monotonic()
    with stage("train", config={}):
        pass
    assert time.monotonic() - started < 300, "not the interval"
    assert connect().get_run(run_of("train")).info.status == "FINISHED"


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


def test_a_store_that_is_locked_for_a_while_costs_nothing(
    own_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even how the run has ended: MLflow waits 20 s for a lock, and a stage as long for MLflow."""
    other = sqlite3.connect(own_store.parent / "mlflow.db", isolation_level=None, check_same_thread=False)
    with stage("train", config={}) as run:
        while not run.tracker.run_id:
            time.sleep(0.05)
        run.metrics(1, {"em": 0.5})
        other.execute("BEGIN EXCLUSIVE")
        run.metrics(2, {"em": 0.75})
        release = threading.Timer(9, other.execute, ["ROLLBACK"])
        release.start()
    release.join()
    client = connect()
    found = client.get_run(run_of("train")).info
    assert found.status == "FINISHED" and "warning" not in capsys.readouterr().err
    history = client.get_metric_history(found.run_id, "em")
    assert {(point.step, point.value) for point in history} == {(1, 0.5), (2, 0.75)}


@pytest.mark.thorough
def test_a_store_that_stays_locked_ends_no_stage(own_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(own_store.parent / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with stage("train", config={}, outputs=[Path("out")]) as run:
            run.metrics(1, {"em": 0.5})
            run.output(Path("out")).touch()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "database is locked" in line and Path("out").exists()


def test_no_message_names_a_password(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:" + "secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert Pipeline("pipeline").run_id is None
    with pytest.raises(InfrastructureError) as caught, store():
        pass
    said = capsys.readouterr()
    assert "127.0.0.1" in said.err and "127.0.0.1:9" in str(caught.value)
    assert "secret" not in said.err + said.out + str(caught.value)


def test_a_deleted_experiment_is_named_with_its_cure(
    own_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect()
    client.delete_experiment("1")
    with stage("train", config={}) as run:
        run.metrics(1, {"em": 0.5})
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "the experiment dgpo was deleted in MLflow" in line
    assert line.endswith("mlflow experiments restore -x 1")
    client.restore_experiment("1")
    with stage("train", config={}):
        pass
    assert client.get_run(run_of("train")).info.status == "FINISHED"


def test_stages_stay_with_their_pipeline_when_the_experiment_is_renamed(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the pipeline would find no stage of its own, and delete its run."""
    pipeline, run_id = opened(monkeypatch)
    client = connect()
    client.rename_experiment("1", "dgpo, first half of the year")
    with stage("train", config={}):
        pass
    pipeline.close(succeeded=True)
    assert client.get_run(run_of("train")).info.experiment_id == "1"
    parent = client.get_run(run_id).info
    assert (parent.status, parent.lifecycle_stage) == ("FINISHED", "active")


def test_a_pipeline_that_this_store_does_not_know_keeps_no_stage_out(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIPELINE_RUN, "f" * 32)
    with stage("train", config={}):
        pass
    assert connect().get_run(run_of("train")).info.status == "FINISHED"


def test_a_run_whose_process_is_gone_is_closed_by_the_next_start(own_store: Path) -> None:
    code = (
        "import os, signal; from tasks.tracking.runs import connect, start_run;"
        "print(start_run(connect(), 'train', {}), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    gone = done.stdout.strip()
    client = connect()
    own, elsewhere, reused, unknown = (start_run(client, name, {}) for name in ("own", "far", "new", "old"))
    client.set_tag(elsewhere, "process.host", "another-machine 0 pid:[1]")
    client.set_tag(elsewhere, "process.pid", "999999")
    client.set_tag(reused, "process.began", "an-earlier-boot 1000")  # the number is another process's by now
    client.set_tag(unknown, "process.pid", "no number")
    assert client.get_run(gone).info.status == "RUNNING"
    with stage("train", config={}):
        pass
    runs = (gone, own, elsewhere, reused, unknown)
    states = [client.get_run(run).info.status for run in runs]
    assert states == ["KILLED", "RUNNING", "RUNNING", "KILLED", "RUNNING"]


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
