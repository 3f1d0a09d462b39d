"""`dgpo serve`: the agent as an HTTP service until Ctrl-C or SIGTERM."""

import os
import re
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from dgpo_core.config.params import load_params
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.serving.access import LOOPBACK, restrict
from dgpo_core.serving.app import make_app
from dgpo_core.serving.limits import server_config
from dgpo_core.serving.queue import RequestQueue
from tasks.commands.agent import example_questions, open_agent, require_index, resolve_model
from tasks.project.servers import listen, run
from tasks.tracking.answers import AnswerRecorder

KEY = "DGPO_API_KEY"  # variable of the environment: options can be seen by everyone on a machine
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
    history: bool = False,
    trace: bool = False,
    rate: int | None = None,
) -> None:
    """Listen at once and load meanwhile (/health says 503). Raise UserError for what keeps it from starting.

    `hosts` and `origins` are further ones that are allowed; `history` puts conversations before questions;
    `trace` keeps answers in MLflow; `rate` is the requests a minute of one address.
    Ends the process with 1 when the retriever cannot be reached.
    """
    require_hosts(hosts)
    example = "scheme, host and port without a path, such as http://localhost:3000"
    _require("--allow-origin", origins, ORIGIN, example)
    key = api_key(host)
    params = load_params()
    require_index()
    listening = listen(host, port)
    source = resolve_model(params, model)
    queue = RequestQueue(waiting, params.rollout.slots)
    recorder = AnswerRecorder() if trace else None
    app = make_app(queue, example_questions(params), history, recorder)
    restrict(app, host, hosts, origins, key, rate)
    config = server_config(app, GRACE)
    print(f"loading {source} and the index", flush=True)
    loading = queue.open(lambda: open_agent(params, source, model))
    try:
        run(Server(config, queue), listening, loading, f"{source} answers at {{url}} (Ctrl-C ends it)")
    except InfrastructureError as error:
        print(f"error: the retriever is not there: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        queue.shutdown()
        if recorder:
            recorder.close()


def api_key(host: str, variable: str = KEY) -> str | None:
    """Return the key that requests must know, if there is one; without it say who may ask at `host`.

    Raises UserError for a key that no header can have.
    """
    key = os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{variable}: only visible ASCII characters")
    if not key and host not in LOOPBACK:
        print(f"note: whoever reaches {host} may ask; a key in {variable} keeps others out", file=sys.stderr)
    return key or None


def require_hosts(hosts: Sequence[str]) -> None:
    """Raise UserError for a name of --allow-host that is none."""
    _require("--allow-host", hosts, HOST, "a name without scheme and port, such as host.docker.internal")


def _require(option: str, values: Sequence[str], form: re.Pattern[str], example: str) -> None:
    for value in values:
        if not form.fullmatch(value):
            raise UserError(f"{option} {value}: {example}")


class Server(uvicorn.Server):
    """Cancels the episodes when it is told to end: their clients hear so, and nothing is waited for."""

    def __init__(self, config: uvicorn.Config, queue: RequestQueue) -> None:
        super().__init__(config)
        self._queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._queue.close()
        super().handle_exit(sig, frame)
