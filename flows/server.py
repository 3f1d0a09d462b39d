"""A Prefect server around a command: `python -m flows.server --port 4200 -- COMMAND ...`.

PREFECT_API_URL names the server to use (`make up` counts as naming it). Without it, a server that answers on
the port is used and left alone; otherwise one is started here and ends with the command.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from dgpo_core.errors import UserError
from flows.process import end_group
from tasks.stage import main as run_program

API_URL = "PREFECT_API_URL"
START_TIMEOUT = 120.0  # seconds; 6-8 on an idle machine


@contextlib.contextmanager
def local_server(port: int) -> Iterator[str]:
    """The URL of the server's API on 127.0.0.1. Raises UserError when it does not start."""
    url = f"http://127.0.0.1:{port}/api"
    if answers(url):
        yield url
        return
    command, environment = server_command(port)
    log = Path(environment["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        _wait(server, url, log)
        yield url
    finally:
        end_group(server)


def server_command(port: int) -> tuple[list[str], dict[str, str]]:
    """(command, what it needs in its environment) of a Prefect server on 127.0.0.1."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return command, {
        "PREFECT_HOME": str(Path(os.environ.get("PREFECT_HOME", ".prefect")).resolve()),
        # otherwise the page looks for the API on port 4200
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def answers(url: str) -> bool:
    """Whether a Prefect API answers at `url`."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.read().strip() == b"true")
    except (OSError, ValueError):
        return False


def _wait(server: subprocess.Popen[str], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the Prefect server does not start at {url} (is the port taken?); see {log}")
        time.sleep(0.3)


def around(
    command: Annotated[list[str], typer.Argument(help="what to run with the server")],
    port: Annotated[int, typer.Option(help="port on 127.0.0.1, where no server is named")] = 4200,
) -> None:
    """Run a command with a Prefect server."""
    with _server(port) as url:
        print(f"Prefect: {url.removesuffix('/api')}", flush=True)
        child = subprocess.Popen(command, env={**os.environ, API_URL: url})
        try:
            code = _wait_through_interrupts(child)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                child.wait()
    raise typer.Exit(code)


@contextlib.contextmanager
def _server(port: int) -> Iterator[str]:
    """The named server, or a local one. Raises UserError when it does not answer."""
    named = os.environ.get(API_URL)
    if not named:
        with local_server(port) as url:
            yield url
    elif answers(named):
        yield named
    else:
        raise UserError(f"{API_URL}={named} does not answer; start that server, or unset the variable")


def _wait_through_interrupts(child: subprocess.Popen[bytes]) -> int:
    """Ctrl-C reaches the child too, and it is the child's to decide how it ends."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return child.wait()


if __name__ == "__main__":
    run_program(lambda: typer.run(around))
