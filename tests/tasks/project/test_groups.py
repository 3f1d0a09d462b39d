"""Process groups: nothing survives them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.project.groups import Ended, end_all, run_group
from tests.conftest import alive


def test_lines_and_exit_code(tmp_path: Path) -> None:
    lines: list[str] = []
    code, tail = run_group(["sh", "-c", "echo a; echo b >&2; exit 3"], tmp_path, os.environ, lines.append)
    assert code == 3
    assert sorted(lines) == ["a", "b"]
    assert tail == "\n".join(lines)


def test_children_left_behind_are_ended(tmp_path: Path) -> None:
    script = "sleep 600 & echo $! > pid"
    code, _ = run_group(["sh", "-c", script], tmp_path, os.environ, print)
    assert code == 0
    assert not alive(int((tmp_path / "pid").read_text()))


def test_timeout_ends_the_whole_group(tmp_path: Path) -> None:
    script = "sleep 600 & echo $! > pid; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run_group(["sh", "-c", script], tmp_path, os.environ, print, timeout=1)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_end_all_ends_what_ignores_nothing_and_what_ignores_sigterm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.project.groups.end_group.__defaults__", (1.0,))
    program = (
        "import os, signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    )
    told: list[str] = []

    def run() -> None:
        try:
            run_group([sys.executable, "-c", program], tmp_path, os.environ, print)
        except Ended:
            told.append("ended, which is no failure")

    thread = threading.Thread(target=run)
    thread.start()
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    end_all()
    thread.join()
    assert not alive(int(pid.read_text()))
    assert told == ["ended, which is no failure"]
