"""Servers: how a program of ours listens, and the records of those that `dgpo up` keeps running here.

`dgpo serve` and `dgpo retriever` listen at once, load meanwhile and end cleanly (`listen`, `run`). Whoever
starts a program of ours in the working directory uses the servers of `dgpo up` without being told: `adopt`
puts their addresses into the environment, where nothing is set yet.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from pydantic import TypeAdapter, ValidationError

from dgpo_core.errors import UserError
from dgpo_core.files import write_json
from tasks.project.process import began

if TYPE_CHECKING:
    import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """Listen there. Raise UserError when nothing can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        place = f"--host {host} --port {port}"
        raise UserError(f"{place}: cannot listen there ({reason}); choose another") from None


def run(server: "uvicorn.Server", listening: socket.socket, load: Awaitable[None], ready: str) -> None:
    """Serve until a signal; `load` runs beside, and `ready` is printed (its {url} filled in) when it is done.

    What `load` raises ends the server and is raised.
    """
    asyncio.run(_run(server, listening, load, ready))


async def _run(server: "uvicorn.Server", listening: socket.socket, load: Awaitable[None], ready: str) -> None:
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    loading = asyncio.ensure_future(load)
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done() and loading.exception() is None and not serving.done():
        print(ready.replace("{url}", _url(listening)), flush=True)
    server.should_exit |= loading.done() and loading.exception() is not None
    await serving
    await loading


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


FOLDER = Path(".services")
MARK = "DGPO_SERVICE"  # environment: a service's token, which everything that it starts inherits


@dataclass(frozen=True)
class ServiceRecord:
    """A service that was started: who it is as a process, and where it answers."""

    name: str
    token: str  # random; known to no other process
    command: list[str]
    variable: str  # of the environment that tells our programs its address
    address: str
    health: str  # URL that answers with 200 when it is ready
    page: str  # URL for people
    pid: int = 0  # 0: the record was written, the process was not yet
    began: str = ""  # when, as `process.began` says it
    place: str = ""  # the folder of records that it was written to, which a copy of it is not


def path(name: str, folder: Path = FOLDER) -> Path:
    return folder / f"{name}.json"


def write(record: ServiceRecord, folder: Path = FOLDER) -> None:
    write_json(path(record.name, folder), {**asdict(record), "place": _place(folder)})


def read(name: str, folder: Path = FOLDER) -> ServiceRecord | None:
    """Read a service's record: None where there is none, or a copied one, whose server is another checkout's.

    Raises UserError for a file that is no record.
    """
    file = path(name, folder)
    try:
        record = TypeAdapter(ServiceRecord).validate_json(file.read_bytes())
        return record if record.place in ("", _place(folder)) else None
    except FileNotFoundError:
        return None
    except ValidationError as error:
        problem: Any = error.errors()[0]["msg"]
        raise UserError(f"{file}: not a record of a service ({problem}); see `ps`, then delete it") from None


def _place(folder: Path) -> str:
    """Identify the folder by what stays the same when it is moved, and does not when it is copied."""
    found = folder.stat()
    return f"{found.st_dev}:{found.st_ino}"


def leader(record: ServiceRecord) -> psutil.Process | None:
    """Return the process that was started, if it still runs: a later one with its number is another's."""
    if not record.pid or began(record.pid) != record.began:
        return None
    try:
        return psutil.Process(record.pid)
    except psutil.Error:  # it has just ended
        return None


def members(record: ServiceRecord) -> list[psutil.Process]:
    """List all of it that runs: what carries its token, and its process group while its leader lives."""
    first = leader(record)
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            grouped = first is not None and os.getpgid(process.pid) == first.pid
            if grouped or process.environ().get(MARK) == record.token:
                found.append(process)
    return found


def adopt(folder: Path = FOLDER) -> None:
    """Take the addresses of running services into the environment; what stands there already goes first."""
    for file in sorted(folder.glob("*.json")):
        record = read(file.stem, folder)
        if record and leader(record):
            os.environ.setdefault(record.variable, record.address)
