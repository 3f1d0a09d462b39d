"""`dgpo retriever`: the index of this working tree as an HTTP service until Ctrl-C or SIGTERM."""

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import uvicorn

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.client import KEY
from dgpo_core.retrieval.index import Index, open_index
from dgpo_core.retrieval.service import RetrieverService, make_app, refusal
from dgpo_core.retrieval.shards import read_manifest
from dgpo_core.serving.access import restrict
from dgpo_core.serving.limits import server_config
from tasks.commands.serve import api_key, require_hosts
from tasks.project.paths import INDEX
from tasks.project.progress import Reporter
from tasks.project.servers import listen, run

GRACE = 30  # seconds for the searches under way


def retriever(
    location: str | None, host: str, port: int, hosts: Sequence[str] = (), rate: int | None = None
) -> None:
    """Serve the index: listen at once and load it meanwhile (/health says 503).

    `hosts` are further names of this machine, `rate` the requests a minute of one address. Raises UserError
    for what cannot be served. Ends the process with 1 when the index cannot be reached.
    """
    require_hosts(hosts)
    key = api_key(host, KEY)
    params = _located(load_params(), location)
    manifest = read_manifest(INDEX)
    listening = listen(host, port)
    service = RetrieverService(params.retrieval.top_k)
    app = make_app(service)
    restrict(app, host, hosts, key=key, rate=rate, refusal=refusal)
    config = server_config(app, GRACE)
    reporter = Reporter("retriever")

    def progress(done: int, total: int, what: str) -> None:
        reporter.update(done, total, doing=what)

    def open_it() -> Index:
        return open_index(INDEX, params.retrieval, progress)

    async def load() -> None:
        service.open(await _in_daemon_thread(open_it), manifest.passages)
        reporter.close()

    print(f"loading {INDEX} ({manifest.passages} passages) at {params.retrieval.location}", flush=True)
    try:
        run(uvicorn.Server(config), listening, load(), "the retriever answers at {url} (Ctrl-C ends it)")
    except InfrastructureError as error:
        print(f"error: the index is not there: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        service.close()


def _located(params: Params, location: str | None) -> Params:
    """Put another location of the index into `params`. Raises UserError for one that cannot be served."""
    if location is not None:
        try:
            parse_location(location)
        except ValueError as error:
            raise UserError(f"--{error}") from None
        retrieval = params.retrieval.model_copy(update={"location": location})
        params = params.model_copy(update={"retrieval": retrieval})
    if parse_location(params.retrieval.location).kind == "service":
        raise UserError(
            "retrieval.location is a retriever service itself; name the index to serve with --location"
        )
    return params


async def _in_daemon_thread(work: Callable[[], Index]) -> Index:
    """Return the result of `work`, done in a thread that does not keep the process from ending."""
    result: Future[Index] = Future()
    result.set_running_or_notify_cancel()

    def body() -> None:
        try:
            result.set_result(work())
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return await asyncio.wrap_future(result)
