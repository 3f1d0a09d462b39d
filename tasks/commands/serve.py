"""`dgpo serve`: the agent as an HTTP service until Ctrl-C or SIGTERM."""

import re
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from dgpo_core.config.params import load_params
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.app import make_app
from dgpo_core.serving.queue import Desk
from tasks.commands.answering import called, open_agent, require_index, resolve_model
from tasks.project.servers import listen, run

GRACE = 5  # seconds for the last words to clients
HOST = re.compile(r"[\w.-]+|[0-9a-fA-F:]+:[0-9a-fA-F:]*")  # a name or an address, without a port
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")


def serve(
    model: str | None,
    host: str,
    port: int,
    waiting: int,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> None:
    """Listen at once and load meanwhile (/health says 503). Raise UserError for what keeps it from starting.

    `hosts` and `origins` are further ones that are allowed. Ends the process with 1 when the retriever cannot
    be reached.
    """
    for name in hosts:
        if not HOST.fullmatch(name):
            example = "a name without scheme and port, such as host.docker.internal"
            raise UserError(f"--allow-host {name}: {example}")
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            example = "scheme, host and port without a path, such as http://localhost:3000"
            raise UserError(f"--allow-origin {origin}: {example}")
    params = load_params()
    require_index()
    listening = listen(host, port)
    source = resolve_model(model)
    desk = Desk(waiting)
    config = uvicorn.Config(
        make_app(desk, host, hosts, origins),
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
        ws="none",
    )
    print(f"loading {source} and the index", flush=True)
    loading = desk.open(lambda: open_agent(params, source, called(model, source)))
    try:
        run(Server(config, desk), listening, loading, f"{source} answers at {{url}} (Ctrl-C ends it)")
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
