"""`dgpo retriever`: the index of this working tree as an HTTP service until Ctrl-C or SIGTERM."""

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import uvicorn

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.index import Index, open_index
from dgpo_core.retrieval.service import Retrieval, make_app
from dgpo_core.retrieval.shards import read_manifest
from tasks.project.paths import INDEX
from tasks.project.progress import Reporter
from tasks.project.servers import listen, run

GRACE = 30  # seconds for the searches under way
T = TypeVar("T")


def retriever(location: str | None, host: str, port: int) -> None:
    """Listen at once and load meanwhile (/health says 503). Raises UserError.

    Ends the process with 1 when the index cannot be reached.
    """
    params = _located(load_params(), location)
    manifest = read_manifest(INDEX)
    listening = listen(host, port)
    retrieval = Retrieval(params.retrieval.top_k)
    config = uvicorn.Config(
        make_app(retrieval),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        lifespan="off",
        ws="none",
    )
    reporter = Reporter("retriever")

    def open_it() -> Index:
        return open_index(
            INDEX, params.retrieval, lambda done, total, what: reporter.update(done, total, doing=what)
        )

    async def load() -> None:
        retrieval.open(await _in_background(open_it), manifest.passages)
        reporter.close()

    print(f"loading {INDEX} ({manifest.passages} passages) at {params.retrieval.location}", flush=True)
    try:
        run(uvicorn.Server(config), listening, load(), "the retriever answers at {url} (Ctrl-C ends it)")
    except InfrastructureError as error:
        print(f"error: the index is not there: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        retrieval.close()


def _located(params: Params, location: str | None) -> Params:
    """The parameters with another location of the index. Raises UserError for one that cannot be served."""
    if location is not None:
        try:
            kind = parse_location(location).kind
        except ValueError as error:
            raise UserError(f"--{error}") from None
        retrieval = params.retrieval.model_copy(update={"location": location})
        params = params.model_copy(update={"retrieval": retrieval})
    else:
        kind = parse_location(params.retrieval.location).kind
    if kind == "service":
        raise UserError(
            "retrieval.location is a retriever service itself; name the index to serve with --location"
        )
    return params


async def _in_background(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def body() -> None:
        try:
            outcome: tuple[T | None, Exception | None] = (work(), None)
        except Exception as error:
            outcome = (None, error)
        loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=body, daemon=True).start()
    return await done
