"""A service that listens at once, loads meanwhile, and ends cleanly: what `serve` and `retriever` share."""

import asyncio
import os
import socket
from collections.abc import Awaitable

import uvicorn

from dgpo_core.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """Raises UserError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        place = f"--host {host} --port {port}"
        raise UserError(f"{place}: cannot listen there ({reason}); choose another") from None


def run(server: uvicorn.Server, listening: socket.socket, load: Awaitable[None], ready: str) -> None:
    """Serve until a signal; `load` runs beside, and `ready` is printed (its {url} filled in) when it is done.

    What `load` raises ends the server and is raised.
    """
    asyncio.run(_run(server, listening, load, ready))


async def _run(server: uvicorn.Server, listening: socket.socket, load: Awaitable[None], ready: str) -> None:
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
