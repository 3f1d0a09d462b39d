"""Stages side by side, on a small, real DVC repository."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from tasks.project.graph import Stage, read_dag
from tasks.project.side_by_side import Order, Result, run_stages
from tests.conftest import alive

# A stage notes its start and end; it may have to wait for a file, or to fail.
STAGE = """
import os, sys, time
from pathlib import Path

name, wait = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
Path(f"{name}.on").write_text(str(os.getpid()))
note = lambda what: open("log.txt", "a").write(f"{what} {name}\\n")
note("start")
while wait and not Path(wait).exists():
    time.sleep(0.05)
if Path(f"{name}.fail").exists():
    sys.exit(f"{name} fails")
Path(f"{name}.txt").write_text(name)
note("end")
"""

PIPELINE = """
stages:
  last: {cmd: exec python stage.py last, deps: [left.txt, right.txt], outs: [last.txt]}
  right: {cmd: exec python stage.py right left.on, deps: [first.txt], outs: [right.txt]}
  left: {cmd: exec python stage.py left right.on, deps: [first.txt], outs: [left.txt]}
  first: {cmd: exec python stage.py first, outs: [first.txt]}
"""


@pytest.fixture
def repository(dvc_repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DGPO_PIPELINE_RUN", "")
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    return dvc_repository


def log() -> list[str]:
    return Path("log.txt").read_text().splitlines()


@pytest.mark.thorough
def test_two_that_wait_for_each_other_end_and_dvc_sees_what_they_did(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_stages(read_dag(repository), 2) == 0
    assert log()[:2] == ["start first", "end first"] and log()[-2:] == ["start last", "end last"]
    assert {line.split()[0] for line in log()[2:4]} == {"start"}
    said = capfd.readouterr().out.splitlines()
    assert "[left] Running stage 'left':" in said and not any("Updating lock" in line for line in said)
    assert said[-1].startswith("4 stages in ")
    status = subprocess.run(["dvc", "status"], capture_output=True, text=True, check=True).stdout
    assert "up to date" in status

    assert run_stages(read_dag(repository), 2) == 0
    assert len(log()) == 8
    said = capfd.readouterr().out.splitlines()
    assert sorted(said[:-1]) == sorted(
        f"Stage '{name}' didn't change, skipping" for name in read_dag(repository)
    )
    assert said[-1] == "Data and pipelines are up to date."


@pytest.mark.thorough
def test_after_a_failure_what_runs_ends_and_nothing_starts(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("left.fail").touch()
    assert run_stages(read_dag(repository), 2) == 255
    assert "end right" in log() and "start last" not in log()
    said = capfd.readouterr().out
    assert "[left] left fails" in said and "error: left failed; no other stage is started" in said
    Path("left.fail").unlink()
    assert run_stages(read_dag(repository), 2) == 0
    assert log().count("start right") == 1 and log()[-1] == "end last"


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_pipeline(repository: Path, number: signal.Signals) -> None:
    Path("dvc.yaml").write_text(PIPELINE.replace("left.on", "never").replace("right.on", "never"))
    code = (
        "from pathlib import Path; from tasks.project.process import exit_on_signals; exit_on_signals(); "
        "from tasks.project.graph import read_dag; from tasks.project.side_by_side import run_stages; "
        "run_stages(read_dag(Path()), 2)"
    )
    # stages of ours end with their parent by themselves
    program = STAGE.replace(
        "import os", "from tasks.project.process import die_with_parent; die_with_parent(); import os", 1
    )
    Path("stage.py").write_text(program)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as process:
        files = [Path("left.on"), Path("right.on")]
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None
            time.sleep(0.05)
        os.kill(process.pid, number)
    pids = [int(file.read_text()) for file in files]
    end = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids))
    assert not Path("last.on").exists()


def test_whom_most_wait_for_goes_first_and_others_get_what_it_leaves() -> None:
    stages = [
        Stage(name="index"),
        Stage(name="evaluate", upstream=("index",)),
        Stage(name="teach", upstream=("index",)),
        Stage(name="distill", upstream=("teach",)),
        Stage(name="another", upstream=("distill",)),
        Stage(name="report", upstream=("another", "evaluate")),
    ]
    order = Order({stage.name: stage for stage in stages})

    def start(expected: str) -> Future[Result]:
        assert order.next() == expected
        future: Future[Result] = Future()
        future.set_result(Result(expected, 0, True))
        return future

    order.running[index := start("index")] = "index"
    assert order.next() is None
    order.end(index)
    for name in ("teach", "distill"):
        order.running[future := start(name)] = name
        assert order.is_behind("evaluate") and not order.is_behind(name)
        order.end(future)
    start("another")  # as many wait for it as for `evaluate`, and a longer chain has led to it
    start("evaluate")
