"""stage(): state, outputs, records; in this process, with a real MLflow store."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dgpo_core.errors import InfrastructureError, NotFinite, UserError
from tasks.stages.stage import stage
from tests.conftest import run_python
from tests.tasks.miniature import failure

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
        run.output(Path("model")).mkdir()
        (run.output(Path("model")) / "half").write_text("half")
        run.output(Path("metrics.json")).with_name("metrics.json.part").write_text("{")
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
        run.output(Path("out")).write_text("x")
        run.summary({"em": 0.25})
    assert not STATE.exists()
    record = json.loads(Path("runs/train/run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["summary"] == {"em": 0.25}
    assert record["peak_memory_bytes"] > 10_000_000
    assert len(record["mlflow_run"]) == 32


def test_failure_leaves_what_was_there_and_nothing_half_written() -> None:
    Path("kept.json").write_text("{}")
    Path("folder").mkdir()
    Path("folder/file").write_text("earlier")
    outputs = [Path("new.json"), Path("kept.json"), Path("folder")]
    with pytest.raises(RuntimeError), stage("train", config={}, outputs=outputs) as run:
        for output in outputs[:2]:
            run.output(output).write_text("{ ")
        run.output(outputs[2]).mkdir()
        (run.state / "checkpoint.pt").write_text("step 3")
        raise RuntimeError
    assert Path("kept.json").read_text() == "{}"
    assert Path("folder/file").read_text() == "earlier"
    assert not Path("new.json").exists()
    left = {path.name for path in STATE.iterdir()} - {"mlflow_run"}
    assert left == {"checkpoint.pt", "failure.json", "fingerprint.json"}


def test_what_a_killed_run_left_half_written_is_gone() -> None:
    fail(RuntimeError("out of luck"))
    (STATE / "outputs/0").mkdir(parents=True)
    (STATE / "outputs/0/metrics.json.part").touch()
    with stage("train", config={"lr": 1}, inputs=[Path("input.txt")]) as run:
        assert (run.state / "checkpoint.pt").is_file()
        assert not (run.state / "outputs").exists()


def test_attempts_say_how_each_ended_and_which_belong_together() -> None:
    """The second is killed, and so says nothing; the fourth has other settings."""
    fail(RuntimeError("out of\n luck"))
    program = (
        "import os\nfrom pathlib import Path\nfrom tasks.stages.stage import stage\n"
        "with stage('train', config={'lr': 1}, inputs=[Path('input.txt')]): os.kill(os.getpid(), 9)"
    )
    assert run_python(program).returncode == -9
    fail(SystemExit(143))
    checkpoint_seen({"lr": 2})
    attempts = json.loads(Path("runs/train/attempts.json").read_text())
    assert [entry["attempt"] for entry in attempts] == [1, 2, 3, 4]
    assert [entry["status"] for entry in attempts] == ["failed", "unresolved", "stopped", "completed"]
    assert [entry.get("message") for entry in attempts] == [
        "out of luck",
        None,
        "stopped with exit code 143",
        "",
    ]
    first, *others, last = [entry["fingerprint"] for entry in attempts]
    assert others == [first, first] and last != first


@pytest.mark.parametrize("link", ["hard", "soft", "whole folder"])
def test_nothing_is_written_through_a_link(link: str) -> None:
    """DVC may link outputs into its cache, where a file is named by its content and nobody may write."""
    Path("cache/folder").mkdir(parents=True)
    Path("evaluation").mkdir()
    for name in ("metrics.json", "folder/episodes"):
        kept, output = Path("cache") / name, Path("evaluation") / name
        kept.write_text("as its name says")
        kept.chmod(0o444)
        if link == "whole folder" and "/" in name:
            output.parent.symlink_to(kept.parent.resolve())
            continue
        output.parent.mkdir(exist_ok=True)
        if link == "hard":
            output.hardlink_to(kept)
        else:
            output.symlink_to(kept.resolve())
    outputs = [Path("evaluation/metrics.json"), Path("evaluation/folder")]
    with stage("train", config={}, outputs=outputs) as run:
        run.output(outputs[0]).write_text("new")
        run.output(outputs[1]).mkdir()
        (run.output(outputs[1]) / "episodes").write_text("new")
    for name in ("metrics.json", "folder/episodes"):
        assert (Path("cache") / name).read_text() == "as its name says"
        assert (Path("evaluation") / name).read_text() == "new"
    assert not Path("evaluation/folder").is_symlink()


def test_outputs_on_another_disk() -> None:
    """data/ is a link to where there is room; a rename cannot lead there."""
    disk = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        Path("data").symlink_to(disk)
        (disk / "index").mkdir()
        (disk / "index/old").touch()
        with stage("train", config={}, outputs=[Path("data/index")]) as run:
            run.output(Path("data/index")).mkdir()
            (run.output(Path("data/index")) / "new").touch()
        assert sorted(path.name for path in disk.rglob("*")) == ["index", "new"]
    finally:
        shutil.rmtree(disk)


@pytest.mark.thorough
def test_two_processes_do_not_run_one_stage_at_once() -> None:
    """By hand; under DVC they do not anyway."""
    program = "from tasks.stages.stage import main, stage\n"
    program += "def run():\n  with stage('train', config={}): print('ran')\nmain(run)"
    command = [sys.executable, "-c", program]
    with stage("train", config={}) as run:
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.stderr == "error: train: another process runs this stage here; wait until it ends\n"
        assert second.returncode == 2
        assert (run.state / "fingerprint.json").is_file()  # the first one's state is not touched
        assert not (run.state / "failure.json").exists()
    assert subprocess.run(command, capture_output=True, text=True).stdout == "ran\n"


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
    message = " ".join(str(error).split()) or type(error).__name__
    expected = {"stage": "train", "kind": kind, "retryable": retryable, "message": message}
    assert failure("train") == expected
    assert not Path("model").exists()
    assert not Path("metrics.json.part").exists()
    checkpoint_seen()
    assert not (STATE / "failure.json").exists()


def test_missing_input_is_the_users_fault() -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt: this input does not exist"):
        stage("train", config={}, inputs=[Path("nowhere.txt")]).__enter__()
    assert failure("train")["kind"] == "user"


def test_missing_output_is_a_bug() -> None:
    with (
        pytest.raises(RuntimeError, match="without writing b"),
        stage("train", config={}, outputs=[Path("a"), Path("b")]) as run,
    ):
        run.output(Path("a")).touch()
    assert not Path("a").exists()


def test_config_that_is_not_json_is_refused() -> None:
    with pytest.raises(TypeError):
        stage("train", config={"path": object()}).__enter__()


def test_what_every_program_imports_is_light() -> None:
    """`dgpo show`, a stage without a model, an error in params.yaml: none waits for torch or MLflow."""
    heavy = ("torch", "transformers", "scipy", "mlflow", "prefect", "dvc", "pandas", "qdrant_client")
    code = f"import sys, tasks.stages.stage; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_number_that_is_none_is_said_with_the_stage() -> None:
    with (
        pytest.raises(UserError, match=r"^toy: the loss of step 2 is infinite; lower the rate$"),
        stage("toy", config={}, outputs=[]),
    ):
        raise NotFinite("loss", float("inf"), "lower the rate", 2)


PROGRAM = """
import errno, resource
from pathlib import Path
from tasks.stages.stage import main, stage

def run():
    {before}
    with stage("train", config={{}}, outputs=[Path("out")]) as current:
        (current.state / "checkpoint.pt").write_text("step 3")
        {body}

main(run)
"""
WRITE = 'current.output(Path("out")).write_text("x")'
FULL = "current.output(Path('out')); open('/dev/full', 'w').write('x' * 9999)"
FILES = "files = [open('/dev/null') for _ in range(100)]"


def failing(before: str, body: str) -> tuple[int, list[str]]:
    """Exit code of a program whose stage fails, and what it says on standard error."""
    program = PROGRAM.format(before=before, body=body)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "body", "said"),
    [
        ("pass", FULL, "out: no space left"),
        ("pass", "raise RuntimeError('IoError(Os { code: 28, kind: Full })')", "no space left on device"),
        ("pass", "raise OSError(errno.EROFS, 'Read-only', 'a/b')", "a/b: read-only file system ("),
        ("pass", "raise PermissionError(errno.EACCES, 'Permission denied', 'x')", "x: permission denied ("),
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))", FILES, "/dev/null: too many open files ("),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(before: str, body: str, said: str) -> None:
    """And is neither a bug, nor tried again at once; what was done is kept."""
    code, errors = failing(before, body)
    assert (code, len(errors)) == (1, 1)
    assert said in errors[0]
    assert "MiB are free there" in errors[0]
    told = failure("train")
    assert (told["kind"], told["retryable"]) == ("infrastructure", False)
    assert errors[0] == f"error: {told['message']}"
    assert (STATE / "checkpoint.pt").read_text() == "step 3"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("before", "body", "said"),
    [
        ("Path('.state').touch()", WRITE, ".state: a file is where a folder is needed; move it away"),
        ("Path('data').touch()", "Path('data/x').mkdir()", "data: a file is where a folder is needed"),
        ("Path('plots').mkdir()", "open('plots', 'w')", "plots: a folder is where a file is needed"),
        ("pass", "(current.state / ('long' * 99)).touch()", "file name too long ("),
    ],
)
def test_what_stands_in_the_way_is_the_users(before: str, body: str, said: str) -> None:
    code, errors = failing(before, body)
    assert (code, len(errors)) == (2, 1)
    assert said in errors[0]


def test_a_bug_keeps_its_traceback() -> None:
    code, errors = failing("pass", "{}[1]")
    assert code == 1
    assert errors[0].startswith("Traceback")
    assert failure("train")["kind"] == "bug"
