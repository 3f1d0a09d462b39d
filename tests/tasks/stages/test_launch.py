"""A stage in several processes: how it starts, fails and ends; with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dgpo_core.errors import UserError
from tasks.stages.launch import read_hosts
from tests.tasks.miniature import change_params, failure, make_project

TOY = [sys.executable, "-m", "tests.tasks.toy_stage"]
SSH = """#!/bin/sh
# plays ssh: the other machine is this one
echo "$@" >> ssh.log
for command; do :; done
exec sh -c "$command"
"""


@pytest.fixture
def project(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_STAGE", "toy")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_project(workplace, compute={"processes": 2})
    return workplace


def alive(pids: list[int]) -> list[int]:
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def waiting(folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A stage both of whose processes wait, and their ids."""
    files = [folder / f"pid-{rank}" for rank in range(2)]
    running = subprocess.Popen([*TOY, "waits"], cwd=folder)
    while not all(file.is_file() and file.read_text() for file in files):
        assert running.poll() is None
        time.sleep(0.1)
    return running, [int(file.read_text()) for file in files]


def gone(pids: list[int], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pids)


@pytest.mark.thorough
def test_two_processes_and_one_result(project: Path) -> None:
    subprocess.run([*TOY, "well"], cwd=project, check=True, timeout=300)
    assert (project / "out").read_text() == "2"
    assert not (project / ".state/toy").exists()
    assert json.loads((project / "runs/toy/run.json").read_text())["status"] == "FINISHED"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("wrong", "user", "compute: a setting that no process can have"),
        ("broken", "bug", "only the second process broke"),
        ("killed", "infrastructure", "process 1 of 2 was ended by SIGKILL (out of memory?)"),
    ],
)
def test_a_fault_ends_all_and_is_told_once(project: Path, how: str, kind: str, said: str) -> None:
    ended = subprocess.run([*TOY, how], cwd=project, capture_output=True, text=True, timeout=300)
    assert ended.returncode == (2 if kind == "user" else ended.returncode) != 0
    told = {"kind": kind, "message": said, "retryable": kind == "infrastructure", "stage": "toy"}
    assert failure("toy") == told
    assert ended.stderr.count(f"error: {said}") == (kind != "bug") and said in ended.stderr
    assert not (project / "out").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_stage(project: Path, how: signal.Signals) -> None:
    running, pids = waiting(project)
    running.send_signal(how)
    code = running.wait(60)
    assert gone(pids)
    if how is signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert not (project / "out").exists()
        assert failure("toy")["kind"] == "infrastructure"


@pytest.mark.thorough
def test_machines_of_a_hostfile(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines with a process each, both of them this one: ssh is played by a shell."""
    (project / "bin").mkdir()
    (project / "bin/ssh").write_text(SSH)
    (project / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (project / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    change_params(compute={"processes": 1, "hostfile": "hosts"})
    subprocess.run([*TOY, "well"], cwd=project, check=True, timeout=300)
    assert (project / "out").read_text() == "2"
    assert " 127.0.0.1 cd " in (project / "ssh.log").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=4\nb slots=2\n", r"hosts:2: b has 2 slots, compute\.processes is 4"),
        ("a\na\n", r"hosts:2: a stands there twice"),
        ("a gpus=4\n", r"hosts:1: expected `name slots=n`, found 'a gpus=4'"),
        ("# nobody\n\n", r"compute\.hostfile: .*hosts: names no machine"),
        (None, r"compute\.hostfile: .*hosts: no such file"),
    ],
)
def test_hostfiles_that_cannot_be(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hosts(tmp_path / "hosts", 4)


def test_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\ngpu-1 slots=8\n\ngpu-2  # any number\n")
    assert read_hosts(tmp_path / "hosts", 8) == ["gpu-1", "gpu-2"]
