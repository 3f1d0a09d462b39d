"""`dgpo serve` as a process: loading, ready, its end, and what keeps it from starting."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from dgpo_core.errors import UserError
from tasks.commands.serve import serve
from tests.conftest import ROOT, free_port
from tests.tasks.miniature import make_project


@contextmanager
def dgpo(
    words: str, folder: Path, scratch: Path, given: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """A command that runs in `folder` until the context ends; temporary files go to `scratch`."""
    command = [sys.executable, "-m", "tasks.commands.cli", *words.split()]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(scratch)}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background job of a shell, as the tests may be, has SIGINT ignored, and so have its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def wait_until_ready(process: subprocess.Popen[str], url: str) -> list[int]:
    """The statuses of /health until it is 200."""
    seen: list[int] = []
    end = time.monotonic() + 400
    while not seen or seen[-1] != 200:
        assert process.poll() is None and time.monotonic() < end
        try:
            seen.append(httpx.get(f"{url}/health", timeout=10).status_code)
        except httpx.ConnectError:
            time.sleep(0.05)
    return seen


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_loads_answers_and_ends_cleanly_in_the_middle_of_an_episode(
    indexed_project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with dgpo(f"serve --model teacher --port {port}", indexed_project, tmp_path) as process:
        assert set(wait_until_ready(process, url)) <= {503, 200}
        body = {"model": "teacher", "messages": [{"role": "user", "content": "Who"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(number)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out.splitlines() == [
        "loading models/teacher and the index",
        f"models/teacher answers at {url} (Ctrl-C ends it)",
    ]
    assert err == ""
    assert list(tmp_path.glob("dgpo-qdrant-*")) == [], "the index's temporary folder"


def test_a_taken_port_is_said(indexed_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(indexed_project)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot .* \(Address already in use\)"):
            serve("teacher", "127.0.0.1", port, 1)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1"])
def test_an_impossible_host_is_said(
    indexed_project: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.chdir(indexed_project)
    with pytest.raises(UserError, match=f"--host {host} --port 0: cannot listen there"):
        serve("teacher", host, 0, 1)


def test_a_retriever_that_is_down_ends_it(
    indexed_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path, retrieval={"location": "http://127.0.0.1:9"})
    (tmp_path / "data").symlink_to(indexed_project / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        serve("teacher", "127.0.0.1", 0, 1)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the retriever is not there: cannot fill the Qdrant collection")
