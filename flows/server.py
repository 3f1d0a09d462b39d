"""A Prefect server around a command: `python -m flows.server --port 4200 -- COMMAND ...`.

PREFECT_API_URL, a port or `dgpo up` names the server to use. Where nothing does, it is port 4200. A server
that answers there is used and left alone; on a port without one, it is started and ends with the command.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import httpx
import typer

from dgpo_core.errors import InfrastructureError, UserError, without_credentials
from tasks.project import servers as services
from tasks.project.groups import end_group
from tasks.project.process import TERMINATED, run_program

API_URL = "PREFECT_API_URL"
PORT = 4200
START_TIMEOUT = 120.0  # seconds; 6-8 on an idle machine
AWAY = 600.0  # seconds for which a server may be away
# A client that was connected tries a request again for 2 + 4 + ... + 256 s; prefect.yaml has the same.
RETRIES = {"PREFECT_CLIENT_MAX_RETRIES": "8"}
GRACE = 30.0  # seconds in which a flow that was ended may tell its server so


@contextlib.contextmanager
def local_server(port: int) -> Iterator[str]:
    """Give the URL of a server's API on 127.0.0.1. Raise UserError when it does not start."""
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
    """Return (command, what it needs in its environment) of a Prefect server on 127.0.0.1."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    return command, {
        "PREFECT_HOME": str(Path(os.environ.get("PREFECT_HOME", ".prefect")).resolve()),
        "PREFECT_UI_URL": f"http://127.0.0.1:{port}",  # for links in notifications
        # otherwise the page looks for the API on port 4200
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        # in memory, as is the default, a restart would forget who has slots, and they would stay taken
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def named_server(port: int | None = None) -> str | None:
    """Return the URL of the API that is to be used, whether it answers or not; None where nothing names one.

    PREFECT_API_URL names it, or `port`, or `dgpo up`. A port that was asked for counts more than `dgpo up`.
    """
    kept = services.read("prefect")
    running = kept.address if kept and services.leader(kept) else None
    named = os.environ.get(API_URL) or running
    if port is not None and named == running:  # `adopt` puts the address of `dgpo up` into the environment
        return f"http://127.0.0.1:{port}/api"
    return named


def running_server(port: int | None = None) -> str:
    """Return the URL of the API that is to be used. Raise UserError where it does not answer."""
    url = named_server(port) or f"http://127.0.0.1:{PORT}/api"
    if not answers(url):
        hint = "dgpo up" if url.endswith("/api") else "an API's address ends with /api"
        raise UserError(f"no Prefect server at {without_credentials(url)}: {hint}")
    return url


@contextlib.contextmanager
def answers_of(url: str) -> Iterator[None]:
    """Say in a sentence what the server at `url` refuses (UserError) or fails to do (InfrastructureError)."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise UserError(f"{url}: {code}: PREFECT_API_AUTH_STRING is missing or wrong") from None
        raise InfrastructureError(f"{url}: {code}: {' '.join(error.response.text.split())[:300]}") from error
    except httpx.HTTPError as error:
        raise InfrastructureError(f"{url}: {error or type(error).__name__}") from error


def answers(url: str) -> bool:
    """Tell whether a Prefect API answers at `url`."""
    try:
        return httpx.get(f"{url}/health", timeout=2, follow_redirects=True).text.strip() == "true"
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def wait_for_server(url: str) -> None:
    """Wait until the server at `url` answers. Raise InfrastructureError after AWAY seconds.

    For requests of clients that are new: those do not try again where nobody listens.
    """
    deadline = time.monotonic() + AWAY
    while not answers(url):
        if time.monotonic() > deadline:
            raise InfrastructureError(f"no Prefect server at {without_credentials(url)} for {AWAY:.0f} s")
        time.sleep(1)


@contextlib.contextmanager
def ending_without_server(url: str) -> Iterator[None]:
    """End the process where the body was ended (SIGTERM, Ctrl-C) and the server at `url` does not answer.

    Prefect would try to tell the server for many minutes. It has GRACE seconds, in which stages end.
    """

    def watch(code: int) -> None:
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if answers(url):
                return
            time.sleep(1)
        print("no Prefect server answers: ended without telling it", file=sys.stderr, flush=True)
        os._exit(code)

    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else TERMINATED
        threading.Thread(target=watch, args=(code,), name="end without server", daemon=True).start()
        raise


def _wait(server: subprocess.Popen[str], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not answers(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"the Prefect server does not start at {url} (is the port taken?); see {log}")
        time.sleep(0.3)


def around(
    command: Annotated[list[str], typer.Argument(help="what to run with the server")],
    port: Annotated[
        int | None,
        typer.Option(help="on 127.0.0.1; without it: PREFECT_API_URL, `dgpo up`'s server, or 4200"),
    ] = None,
) -> None:
    """Run a command with a Prefect server."""
    services.adopt()
    with _server(port) as url:
        print(f"Prefect: {url.removesuffix('/api')}", flush=True)
        child = subprocess.Popen(command, env={**RETRIES, **os.environ, API_URL: url})
        try:
            code = _wait_through_interrupts(child)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                child.wait()
    raise typer.Exit(code)


@contextlib.contextmanager
def _server(port: int | None) -> Iterator[str]:
    """Give the named server, or a local one. Raise UserError when it does not answer."""
    named = named_server(port)
    if named and named == os.environ.get(API_URL):
        if not answers(named):
            raise UserError(f"{API_URL}={named} does not answer; start that server, or unset the variable")
        yield named
        return
    with local_server(port or PORT) as url:
        yield url


def _wait_through_interrupts(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child, which Ctrl-C reaches too: how it ends is its to decide."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return child.wait()


if __name__ == "__main__":
    run_program(lambda: typer.run(around))
