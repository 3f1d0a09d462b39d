"""stage(): state, outputs, records; in this process, with a real MLflow store."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.errors import InfrastructureError, NotFinite, UserError
from tasks.stage import stage

STATE = Path(".state/train")


@pytest.fixture(autouse=True)
def _in_workplace(workplace: Path) -> None:
    Path("input.txt").write_text("a")


def fail(error: BaseException, config: dict[str, object] | None = None) -> None:
    """Run a stage that leaves a checkpoint and then fails."""
    inputs, outputs = [Path("input.txt")], [Path("model"), Path("metrics.json")]
    with (
        pytest.raises(type(error)),
        stage("train", config=config or {"lr": 1}, inputs=inputs, outputs=outputs) as run,
    ):
        (run.state / "checkpoint.pt").write_text("step 3")
        Path("model").mkdir()
        Path("model/half").write_text("half")
        Path("metrics.json.part").write_text("{")
        raise error


def checkpoint_seen(config: dict[str, object] | None = None) -> bool:
    """Whether the next run finds the checkpoint; the run succeeds."""
    with stage("train", config=config or {"lr": 1}, inputs=[Path("input.txt")], outputs=[]) as run:
        return (run.state / "checkpoint.pt").is_file()


def test_continues_with_the_same_fingerprint() -> None:
    fail(RuntimeError("out of luck"))
    assert checkpoint_seen()


@pytest.mark.parametrize("what", ["config", "content", "name of an input"])
def test_starts_clean_with_another_fingerprint(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And says why: hours may have gone into the checkpoint."""
    fail(RuntimeError("out of luck"))
    if what == "content":
        Path("input.txt").write_text("b")
        assert not checkpoint_seen()
    elif what == "config":
        assert not checkpoint_seen({"lr": 2})
    else:
        Path("other.txt").write_text("a")
        with stage("train", config={"lr": 1}, inputs=[Path("other.txt")]) as run:
            assert not (run.state / "checkpoint.pt").exists()
    changed = {"content": "input.txt", "config": "lr", "name of an input": "input.txt, other.txt"}[what]
    assert f"[train] begins again: {changed} changed" in capsys.readouterr().out


def test_folder_inputs_count_names_and_contents() -> None:
    Path("data").mkdir()
    Path("data/a").write_text("1")
    with pytest.raises(RuntimeError), stage("train", config={}, inputs=[Path("data")]) as run:
        (run.state / "checkpoint.pt").touch()
        raise RuntimeError
    Path("data/a").rename("data/b")
    with stage("train", config={}, inputs=[Path("data")]) as run:
        assert not (run.state / "checkpoint.pt").exists()


def test_success_deletes_the_state_and_records_the_run() -> None:
    with stage("train", config={}, outputs=[Path("out")]) as run:
        Path("out").write_text("x")
        run.summary({"em": 0.25})
    assert not STATE.exists()
    record = json.loads(Path("runs/train/run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["summary"] == {"em": 0.25}
    assert record["peak_memory_bytes"] > 10_000_000
    assert len(record["mlflow_run"]) == 32


def test_failure_removes_half_written_outputs_only() -> None:
    Path("old.json").write_text("{}")
    Path("new.json.part").write_text("left by a killed run")
    outputs = [Path("old.json"), Path("new.json"), Path("changed.json")]
    Path("changed.json").write_text("{}")
    with pytest.raises(RuntimeError), stage("train", config={}, outputs=outputs):
        assert not Path("new.json.part").exists()
        Path("new.json").write_text("{")
        Path("changed.json").write_text("{ ")
        raise RuntimeError
    assert Path("old.json").exists()
    assert not Path("new.json").exists()
    assert not Path("changed.json").exists()


@pytest.mark.parametrize(
    ("error", "kind", "retryable"),
    [
        (UserError("params.yaml: lr:\n must be positive"), "user", False),
        (InfrastructureError("retriever down"), "infrastructure", True),
        (ZeroDivisionError("division by zero"), "bug", False),
        (KeyboardInterrupt(), "infrastructure", False),
    ],
)
def test_failure_is_explained_to_the_flow(error: BaseException, kind: str, retryable: bool) -> None:
    fail(error)
    failure = json.loads((STATE / "failure.json").read_text())
    assert (failure["stage"], failure["kind"], failure["retryable"]) == ("train", kind, retryable)
    assert failure["message"] == (" ".join(str(error).split()) or type(error).__name__)
    assert not Path("model").exists()
    assert not Path("metrics.json.part").exists()
    checkpoint_seen()
    assert not (STATE / "failure.json").exists()


def test_missing_input_is_the_users_fault() -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: this input does not exist"):
        stage("train", config={}, inputs=[Path("nowhere.txt")]).__enter__()
    assert json.loads((STATE / "failure.json").read_text())["kind"] == "user"


def test_missing_output_is_a_bug() -> None:
    with (
        pytest.raises(RuntimeError, match="without writing b"),
        stage("train", config={}, outputs=[Path("a"), Path("b")]),
    ):
        Path("a").touch()
    assert not Path("a").exists()


def test_config_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        stage("train", config={"path": object()}).__enter__()


def test_what_every_program_imports_is_light() -> None:
    """`dgpo show`, a stage without a model, an error in params.yaml: none waits for torch or MLflow."""
    heavy = ("torch", "transformers", "scipy", "mlflow", "prefect", "dvc", "pandas", "qdrant_client")
    code = f"import sys, tasks.stage; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_number_that_is_none_is_said_with_the_stage() -> None:
    with (
        pytest.raises(UserError, match=r"^toy: the loss of step 2 is infinite; lower the rate$"),
        stage("toy", config={}, outputs=[]),
    ):
        raise NotFinite("loss", float("inf"), "lower the rate", 2)
