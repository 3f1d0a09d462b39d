"""`dgpo serve`: the agent as an HTTP service until Ctrl-C or SIGTERM."""

import asyncio
import os
import socket
import sys
from types import FrameType

import uvicorn

from dgpo_core.config.params import load_params
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.api import make_app
from dgpo_core.serving.desk import Desk
from tasks.answering import called, open_agent, require_index, resolve_model

GRACE = 5  # seconds for the last words to clients


def serve(model: str | None, host: str, port: int, waiting: int) -> None:
    """Listen at once and load meanwhile (/health says 503). Raises UserError.

    Ends the process with 1 when the retriever cannot be reached.
    """
    params = load_params()
    require_index()
    source = resolve_model(model)
    listening = _listen(host, port)
    desk = Desk(waiting)
    config = uvicorn.Config(
        make_app(desk, host), log_level="warning", timeout_graceful_shutdown=GRACE, lifespan="off", ws="none"
    )
    server = Server(config, desk)
    place = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    async def run() -> None:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        loading = asyncio.create_task(desk.open(lambda: open_agent(params, source, called(model, source))))
        print(f"loading {source} and the index", flush=True)
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is None and not serving.done():
            print(f"{source} answers at {place} (Ctrl-C ends it)", flush=True)
        server.should_exit |= loading.done() and loading.exception() is not None
        await serving
        await loading

    try:
        asyncio.run(run())
    except InfrastructureError as error:
        print(f"error: the retriever is not there: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        desk.close()
        desk.shut()


class Server(uvicorn.Server):
    """Ends the episodes when it is told to end: their clients hear so, and nothing is waited for."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._desk.close()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    """Raises UserError when nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        place = f"--host {host} --port {port}"
        raise UserError(f"{place}: cannot listen there ({reason}); choose another") from None
