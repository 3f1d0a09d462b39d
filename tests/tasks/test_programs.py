"""Stage programs as processes: exit codes, signals, bad parameters, and what a killed `dvc repro` leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import alive
from tests.tasks.miniature import change_params, failure, make_project

PROGRAM = """
import sys, time
from pathlib import Path
from dgpo_core.errors import InfrastructureError, UserError
from tasks.stages.stage import main, stage

def run():
    with stage("work", config={}, outputs=[Path("out.txt")]) as current:
        current.output(Path("out.txt")).write_text("half")
        current.progress(1, 2, em=0.5)
        BODY

main(run)
"""


def write_program(body: str) -> Path:
    """A stage program with `body` inside its stage."""
    path = Path("work.py")
    path.write_text(PROGRAM.replace("BODY", body))
    return path


def execute(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(write_program(body))]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """A generous limit that only keeps a broken test from hanging."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail(f"never happened: {what}")


def test_users_fault_is_one_line_and_exit_code_2(workplace: Path) -> None:
    result = execute('raise UserError("questions.jsonl:3: no\\n id")')
    assert result.returncode == 2
    # a machine with too much to do may keep MLflow's store from answering in time, which is told too
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: MLflow ")]
    assert lines == ["error: questions.jsonl:3: no id"]
    assert "[work] 1/2 em=0.5" in result.stdout
    assert not Path("out.txt").exists()
    assert failure("work")["kind"] == "user"


@pytest.mark.thorough
def test_bug_shows_its_traceback_and_exit_code_1(workplace: Path) -> None:
    result = execute("1 / 0", DVC_STAGE="work@seed1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr
    assert failure("work@seed1")["stage"] == "work@seed1"
    assert not Path("out.txt").exists()


@pytest.mark.thorough
def test_success(workplace: Path) -> None:
    result = execute("pass")
    assert (result.returncode, result.stderr) == (0, "")
    assert Path("out.txt").read_text() == "half"
    assert not Path(".state/work").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_stage_cleanly(workplace: Path, number: signal.Signals) -> None:
    program = write_program("time.sleep(600)")
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.DEVNULL,
        # a background job of a shell, as the tests may be, has SIGINT ignored, and so have its children
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        wait_for(Path(".state/work/outputs/0/out.txt").exists, "the stage works")
        process.send_signal(number)
        assert process.wait() == 128 + number
    assert not Path("out.txt").exists()
    assert failure("work")["retryable"] is False
    stopped = f"stopped with exit code {128 + number}"
    assert failure("work")["message"] == ("KeyboardInterrupt" if number == signal.SIGINT else stopped)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killing_dvc_leaves_no_stage(dvc_repository: Path, number: signal.Signals) -> None:
    body = 'import os; Path("pid").write_text(str(os.getpid())); Path("ready").touch(); time.sleep(600)'
    write_program(body)
    # As `python -m tasks.work` would: the package is imported while sys.argv[0] is still "-m".
    Path("dvc.yaml").write_text("stages:\n  work:\n    cmd: exec python -m runstage\n    outs: [out.txt]\n")
    Path("runstage.py").write_text(
        "import sys, runpy\nsys.argv[0] = '-m'\nimport tasks\nrunpy.run_path('work.py')\n"
    )
    # Without $SHELL dvc takes /bin/sh, which may stay between it and a command without `exec`.
    environment = {key: value for key, value in os.environ.items() if key != "SHELL"}
    with subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as dvc:
        wait_for(Path("ready").exists, "the stage works")
        stage = int(Path("pid").read_text())
        dvc.send_signal(number)
        dvc.wait()
        wait_for(lambda: not alive(stage), "the stage ends")
    assert not Path("out.txt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distil": {}}, "distil: unknown key"),
        ({"seed": "one"}, "seed:"),
        ({"reinforce": {"batch_size": 100, "mini_batch_size": 33}}, "multiple of mini_batch_size"),
    ],
)
def test_broken_params_are_one_clear_line(workplace: Path, change: dict[str, Any], message: str) -> None:
    make_project(workplace)
    change_params(**change)
    result = subprocess.run([sys.executable, "-m", "tasks.stages.data"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "params.yaml" in result.stderr and message in result.stderr
    assert not (workplace / "data").exists()
