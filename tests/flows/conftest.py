"""Real Prefect servers for the flows' tests, and what these ask them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port

# Three stages of a program stage.py, whose argument names the stage; the second trains.
PIPELINE: dict[str, dict[str, Any]] = {
    "data": {"cmd": "exec python stage.py data", "deps": ["stage.py"], "outs": ["data.txt"]},
    "train": {
        "cmd": "exec python stage.py train",
        "deps": ["data.txt"],
        "params": ["reinforce.beta"],
        "outs": ["train.txt"],
        "meta": {"pool": "gpu", "gpus": 1},
    },
    "report": {"cmd": "exec python stage.py report", "deps": ["train.txt"], "outs": ["report.txt"]},
}
WAIT = 1800  # seconds: only keeps a broken test from hanging


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Start a server whose files are in `home`; give its API's URL, which the environment has meanwhile."""
    from flows.server import local_server

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        with local_server(free_port()) as url:
            patch.setenv("PREFECT_API_URL", url)
            yield url


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Prefect server of these tests' own and return its API's URL."""
    # By environment and before the first import: Prefect's background threads see no other settings, and
    # would start a server of their own.
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            yield url
            drain_prefect()


class Server:
    """A Prefect server that can be killed and started again, with its files in `home`."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.start()

    def start(self) -> None:
        from flows.server import answers, server_command

        command, variables = server_command(self.port)
        environment = {**os.environ, **variables, "PREFECT_HOME": str(self.home)}
        with (self.home / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait(lambda: answers(self.url), "the server's start")

    def kill(self) -> None:
        if self.process.poll() is None:  # later its number may be another's
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WAIT} s: {what}")
        time.sleep(0.1)


def drain_prefect() -> None:
    """Send what is buffered while the server still runs; otherwise it is tried for a minute at exit."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with contextlib.suppress(RuntimeError):  # never started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()


def task_runs(flow_run_id: Any) -> list[Any]:
    """Read the tasks of a flow run, one for each stage."""
    from prefect import get_client
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId

    ours = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return list(client.read_task_runs(task_run_filter=ours))
