"""A Prefect server that dies while a stage runs, with the settings that deployments and `dgpo run` have."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from dgpo_core.errors import InfrastructureError
from tests.conftest import ROOT, alive, free_port, run_python
from tests.flows.conftest import WAIT, Server, wait
from tests.web import Handler

# `first` waits until the file `hold` is gone. As stages of ours it ends with its parent.
STAGE = """
import os, sys, time
from pathlib import Path
from tasks.project.process import die_with_parent

die_with_parent()

name = sys.argv[1]
with open("log.txt", "a") as log:
    log.write(f"{name} {os.getpid()}\\n")
while name == "first" and Path("hold").exists():
    time.sleep(0.05)
Path(f"{name}.txt").write_text(name)
"""
PIPELINE = """
stages:
  first: {cmd: exec python stage.py first, outs: [first.txt], meta: {gpus: 1}}
  last: {cmd: exec python stage.py last, deps: [first.txt], outs: [last.txt], meta: {gpus: 1}}
"""


@pytest.fixture
def server(dvc_repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    Path("hold").touch()
    server = Server(dvc_repository / "prefect")
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    monkeypatch.setenv("PREFECT_HOME", str(server.home))
    code = "from prefect import get_client\nwith get_client(sync_client=True) as client:\n"
    code += "    client.upsert_global_concurrency_limit_by_name('dgpo-gpu', 1)"
    assert run_python(code).returncode == 0
    yield server
    server.kill()


@contextlib.contextmanager
def running_flow() -> Iterator["subprocess.Popen[str]"]:
    """Start `dgpo run`'s program; give it when its first stage runs."""
    from flows.server import RETRIES

    with Path("flow.txt").open("w") as output:
        command = [sys.executable, "-m", "flows.pipeline"]
        flow = subprocess.Popen(
            command, env={**os.environ, **RETRIES}, stdout=output, stderr=output, text=True
        )
    try:
        wait(lambda: flow.poll() is not None or ran(), "the first stage")
        assert flow.poll() is None, Path("flow.txt").read_text()
        yield flow
    finally:
        flow.kill()
        flow.wait()


def ran() -> list[list[str]]:
    """Return [stage, process] of each start of a stage."""
    log = Path("log.txt")
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def taken() -> int:
    """Ask the server how many slots are taken."""
    code = "from prefect import get_client\nwith get_client(sync_client=True) as client:\n"
    code += "    print(client.read_global_concurrency_limit_by_name('dgpo-gpu').active_slots)"
    return int(run_python(code).stdout)


def test_a_server_may_be_away_for_six_minutes() -> None:
    """By the settings; clients wait 2, 4, ... seconds, each up to a fifth less by Prefect's jitter."""
    from flows.server import AWAY, RETRIES

    (variable, number), *others = RETRIES.items()
    assert not others and sum(0.8 * 2**n for n in range(1, int(number) + 1)) > 360 < AWAY
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {entry["work_pool"]["job_variables"]["env"][variable] for entry in entries} == {number}


def test_who_needs_a_server_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import server

    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setattr(server, "AWAY", 0.0)
    with pytest.raises(InfrastructureError, match=f"no Prefect server at {url}"):
        server.wait_for_server(url)
    monkeypatch.setattr(server, "AWAY", 600.0)
    waiting = threading.Thread(target=server.wait_for_server, args=[url])
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()

    class Healthy(Handler):
        def do_GET(self) -> None:
            self.answer(200, {}, b"true")

    with ThreadingHTTPServer(("127.0.0.1", int(url.split(":")[2].split("/")[0])), Healthy) as late:
        threading.Thread(target=late.serve_forever).start()
        waiting.join(60)
        late.shutdown()
    assert not waiting.is_alive()


ENDED = """
import time
from flows import server
server.GRACE = 0.5
try:
    with server.ending_without_server("http://127.0.0.1:9/api"):
        raise {error}
finally:
    time.sleep({seconds})  # as Prefect, which tries to tell its server
"""


@pytest.mark.parametrize(
    ("error", "seconds", "code"),
    [("SystemExit", 600, 143), ("KeyboardInterrupt", 600, 130), ("ValueError", 2, 1)],
)
def test_only_who_was_ended_leaves_without_its_server(error: str, seconds: int, code: int) -> None:
    done = run_python(ENDED.format(error=error, seconds=seconds))
    assert done.returncode == code
    assert ("no Prefect server answers" in done.stderr) == (code != 1)


@pytest.mark.thorough
@pytest.mark.parametrize("seconds", [10, pytest.param(360, marks=pytest.mark.slow)])
def test_a_stage_that_ends_while_the_server_is_away_has_succeeded(server: Server, seconds: float) -> None:
    with running_flow() as flow:
        server.kill()
        Path("hold").unlink()
        wait(Path("first.txt").exists, "the stage's end")
        time.sleep(seconds)
        assert flow.poll() is None, Path("flow.txt").read_text()
        server.start()
        assert flow.wait(WAIT) == 0, Path("flow.txt").read_text()
    assert [name for name, _ in ran()] == ["first", "last"]  # nothing was run twice
    assert taken() == 0


@pytest.mark.slow
def test_slots_of_a_process_that_was_killed_are_free_again(server: Server) -> None:
    """When Prefect's lease of 300 s has run out: the next flow waits for them."""
    with running_flow() as flow:
        flow.kill()
        flow.wait()
    assert taken() == 1
    ((_, pid),) = ran()
    wait(lambda: not alive(int(pid)), "the stage's end")
    Path("hold").unlink()
    began = time.monotonic()
    with Path("flow.txt").open("a") as output:
        done = subprocess.run([sys.executable, "-m", "flows.pipeline"], stdout=output, stderr=output)
    assert done.returncode == 0, Path("flow.txt").read_text()
    print(f"\nslots of a killed process: free within {time.monotonic() - began:.0f} s")
    assert [name for name, _ in ran()] == ["first", "first", "last"]
    assert taken() == 0


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_flow_that_is_ended_does_not_wait_for_a_dead_server(server: Server, number: signal.Signals) -> None:
    from flows.server import GRACE

    with running_flow() as flow:
        server.kill()
        flow.send_signal(number)
        began = time.monotonic()
        assert flow.wait(WAIT) == 128 + number
        assert time.monotonic() - began < 2 * GRACE
    ((_, pid),) = ran()
    wait(lambda: not alive(int(pid)), "the stage's end")
    assert not Path("first.txt").exists()
