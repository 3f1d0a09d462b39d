"""Prefect's and MLflow's servers as background processes of this machine: `dgpo up`, `ui`, `status`, `down`.

For one person's machine: they listen on 127.0.0.1 without passwords. For a team: infra/compose.yaml. Qdrant
needs no server here, it runs inside the stages. Records and logs are in `.services/`.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from dgpo_core.errors import UserError, without_credentials
from flows.server import API_URL, START_TIMEOUT, server_command
from tasks.commands.cli import run_as
from tasks.project.process import began, run_program
from tasks.project.progress import duration
from tasks.project.servers import FOLDER, MARK, ServiceRecord, leader, members, path, read, write
from tasks.tracking.pages import runs_address
from tasks.tracking.store import ARTIFACTS, artifact_root, local_path, prepare, tracking_uri

NAMES = ("prefect", "mlflow")
STORE_URL, BACKEND = "MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI"
GRACE = 15.0  # seconds between SIGTERM and SIGKILL
LOCK_TIMEOUT = 2.0

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Service:
    """A server: how it is started, and how it is known to be up."""

    record: ServiceRecord
    port: int
    port_option: str  # of `dgpo up`
    environment: dict[str, str]


def prefect(port: int) -> Service:
    """Describe Prefect's server, whose files are in PREFECT_HOME."""
    command, environment = server_command(port)
    page = f"http://127.0.0.1:{port}"
    record = ServiceRecord("prefect", "", command, API_URL, f"{page}/api", f"{page}/api/health", page)
    return Service(record, port, "--prefect-port", environment)


def mlflow(port: int) -> Service:
    """Describe MLflow's server, on the store that stages use without one: no record is out of sight."""
    store, local = tracking_uri(), local_path(tracking_uri())
    page = f"http://127.0.0.1:{port}"
    root = artifact_root(local) if local else Path(ARTIFACTS).resolve()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--default-artifact-root", root.as_uri()]
    record = ServiceRecord("mlflow", "", command, STORE_URL, page, f"{page}/health", page)
    # The store by environment: it may have a password in it, and everybody can read a command line.
    return Service(record, port, "--mlflow-port", {BACKEND: store, "DO_NOT_TRACK": "1"})


def up(services: Sequence[Service], folder: Path = FOLDER) -> list[str]:
    """Start what does not run and wait until all of it answers. Return the names of those started now.

    Raises UserError when a port is taken, MLflow's store cannot be used or a server does not start; those
    that did start stay up.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(folder):
        started = [service.record.name for service in services if _start(service, folder)]
        for service in services:
            if (record := read(service.record.name, folder)) is not None:
                _wait_until_healthy(record, folder, new=record.name in started)
    return started


def down(folder: Path = FOLDER, names: Sequence[str] = NAMES) -> list[str]:
    """End services with all their processes, also of a server that crashed. Return the names of what ran."""
    if not folder.is_dir():
        return []
    ended = []
    with _alone(folder):
        for name in names:
            if (record := read(name, folder)) is not None:
                if _end(record):
                    ended.append(name)
                path(name, folder).unlink()
    return ended


def state(record: ServiceRecord | None) -> str:
    """Say whether a service runs and answers."""
    if record is None:
        return "stopped"
    if leader(record) is None:
        return "crashed"
    return "running" if _answers(record.health) else "does not answer"


def _start(service: Service, folder: Path) -> bool:
    """Start a server unless it runs or the environment names another. Return whether it was started."""
    new, old = service.record, read(service.record.name, folder)
    if old and leader(old):
        return False
    if (os.environ.get(new.variable) or "").startswith(("http:", "https:")):
        console.print(f"{new.name}: not started, {new.variable} names a server")
        return False
    if old:
        _end(old)  # what a crash has left
    if not _is_free(service.port):
        raise UserError(
            f"{new.name}: port {service.port} is taken by another program; choose one: {service.port_option}"
        )
    prepare(service.environment.get(BACKEND, ""))
    # The record comes first: whatever happens next, `down` finds the process by its token.
    record = replace(new, token=secrets.token_hex(16))
    write(record, folder)
    with _log(record, folder).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            record.command,
            env={**os.environ, **service.environment, MARK: record.token},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C and a closed terminal are not meant for it
        )
    write(replace(record, pid=process.pid, began=began(process.pid) or ""), folder)
    return True


def _wait_until_healthy(record: ServiceRecord, folder: Path, new: bool) -> None:
    begin, deadline = time.monotonic(), time.monotonic() + START_TIMEOUT
    with console.status("") as status:
        while not _answers(record.health):
            waited = time.monotonic() - begin
            status.update(f"{record.name}: waiting for {record.health} ({waited:.0f} s)")
            if leader(record) is None or time.monotonic() > deadline:
                _end(record)
                path(record.name, folder).unlink(missing_ok=True)
                log = _log(record, folder)
                raise UserError(f"{record.name} does not start: {_last_line(log)}; see {log}")
            time.sleep(0.3)
    how = f"up after {duration(time.monotonic() - begin)}" if new else "already running"
    console.print(f"{record.name}: {how}, {_page(record.name, record.page)}")


def _page(name: str, address: str) -> str:
    """Return the page of a server that people want to see first."""
    return runs_address(address) if name == "mlflow" else address


def _end(record: ServiceRecord) -> bool:
    """End all its processes, by SIGKILL those that ignore SIGTERM. Return whether there were any."""
    found = members(record)
    for action in (psutil.Process.terminate, psutil.Process.kill):
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                action(process)
        psutil.wait_procs(found, timeout=GRACE)
        if not (left := members(record)):
            break
        found = left
    return bool(found)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder: two `dgpo up` at once would start everything twice."""
    try:
        with FileLock(folder / "lock", timeout=LOCK_TIMEOUT):
            yield
    except Timeout:
        raise UserError(f"{folder}: another `dgpo up` or `dgpo down` is at work; wait for it") from None


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _log(record: ServiceRecord, folder: Path) -> Path:
    return folder / f"{record.name}.log"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it wrote nothing")


def up_command(prefect_port: int, mlflow_port: int) -> None:
    """Start what does not run yet, and wait until it answers."""
    up([prefect(prefect_port), mlflow(mlflow_port)])


def ui_command(prefect_port: int, mlflow_port: int) -> None:
    """Show both dashboards until Ctrl-C; a server that ran before stays."""
    before = [name for name in NAMES if (record := read(name)) and leader(record)]
    try:
        if up([prefect(prefect_port), mlflow(mlflow_port)]):
            console.print("Ctrl-C ends what was started now")
            signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        down(names=[name for name in NAMES if name not in before])


def down_command() -> None:
    """End all of it."""
    ended = down()
    console.print(f"ended: {', '.join(ended)}" if ended else "nothing was running")


def status_command() -> None:
    """Show what runs, where and since when."""
    table = Table("service", "state", "pid", "for", "address")
    for name in NAMES:
        record = read(name)
        process = record and leader(record)
        age = duration(time.time() - process.create_time()) if process else ""
        pid = str(process.pid) if process else ""
        table.add_row(name, state(record), pid, age, record.page if record else "")
    console.print(table)


def where_command(prefect_port: int = 4200, mlflow_port: int = 5000) -> None:
    """Say where the dashboards are, or how to get them: the last line of `make demo`."""
    found, missing = {}, {}
    for service in (mlflow(mlflow_port), prefect(prefect_port)):
        name, record = service.record.name, read(service.record.name)
        named = os.environ.get(service.record.variable) or ""
        if record and leader(record):
            found[name] = _page(name, record.page)
        elif named.startswith(("http:", "https:")):
            found[name] = _page(name, without_credentials(named).removesuffix("/api"))
        else:
            missing[name] = service.record.page
    lines = [
        f"{way}{', '.join(f'{name} {page}' for name, page in pages.items())}"
        for way, pages in (("", found), ("dgpo ui: ", missing))
        if pages
    ]
    console.print(f"dashboards   {'; '.join(lines)}")


if __name__ == "__main__":
    command = sys.argv.pop(1)
    if command == "where":
        ports = (int(os.environ.get("PREFECT_PORT") or 4200), int(os.environ.get("MLFLOW_PORT") or 5000))
        run_program(lambda: where_command(*ports))
    commands: dict[str, Callable[..., None]] = {
        "up": up_command,
        "ui": ui_command,
        "down": down_command,
        "status": status_command,
    }
    run_as(command, commands[command])
