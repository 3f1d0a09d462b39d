"""`dgpo serve`: the agent as an HTTP service until Ctrl-C or SIGTERM."""

import sys
from types import FrameType

import uvicorn

from dgpo_core.config.params import load_params
from dgpo_core.errors import InfrastructureError
from dgpo_core.serving.api import make_app
from dgpo_core.serving.desk import Desk
from tasks.answering import called, open_agent, require_index, resolve_model
from tasks.listening import listen, run

GRACE = 5  # seconds for the last words to clients


def serve(model: str | None, host: str, port: int, waiting: int) -> None:
    """Listen at once and load meanwhile (/health says 503). Raises UserError.

    Ends the process with 1 when the retriever cannot be reached.
    """
    params = load_params()
    require_index()
    source = resolve_model(model)
    listening = listen(host, port)
    desk = Desk(waiting)
    config = uvicorn.Config(
        make_app(desk, host), log_level="warning", timeout_graceful_shutdown=GRACE, lifespan="off", ws="none"
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
