"""The retriever as an HTTP service: the field's POST /retrieve, so that Search-R1's clients work with it.

    {"queries": [str], "topk": 3, "return_scores": true} -> {"result": [[{"document": {...}, "score": s}]]}

A document is {"id", "contents"} with contents = '"Title"\\ntext'. Without `return_scores` the inner list has
the documents themselves, as in Search-R1's server. Keys that it does not know are ignored, as there.
Concurrent requests are searched in common batches: what waits while one is searched makes up the next.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel, BeforeValidator, Field

from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.client import INDEX_HEADER
from dgpo_core.retrieval.index import Index
from dgpo_core.retrieval.ranking import Hit, Retriever
from dgpo_core.serving.limits import BodyFilter

MAX_TOP_K = 100
MAX_QUERIES = 10_000  # in one request
MAX_QUERY = 100_000  # characters
MAX_BODY = 64 * 2**20  # bytes of a request
MAX_WAITING = 50_000  # queries, beyond which no request may wait
LARGEST_BATCH = 512  # queries in one search
log = logging.getLogger("uvicorn.error")


@dataclass
class _Search:
    queries: list[str]
    top_k: int
    answer: asyncio.Future[list[list[Hit]]]


class Batcher:
    """Searches for concurrent requests in batches, one at a time, in a thread.

    A batch has at most `largest` queries, or one request that has more. Nothing waits for company: alone, a
    request is searched at once. `observe` is told the number of queries and the seconds of each search.
    """

    def __init__(self, retriever: Retriever, largest: int, observe: Callable[[int, float], None]) -> None:
        self._retriever, self._largest, self._observe = retriever, largest, observe
        self._waiting: deque[_Search] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Return how many queries wait for a search."""
        return sum(len(request.queries) for request in self._waiting)

    async def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return what the retriever finds. Raise what it raises, but no UserError about others' queries."""
        request = _Search(queries, top_k, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await request.answer

    async def _work(self) -> None:
        while self._waiting:
            await self._answer(self._next())

    async def _answer(self, batch: list[_Search]) -> None:
        queries = [query for request in batch for query in request.queries]
        search = partial(self._retriever.search, queries, batch[0].top_k)
        started = time.perf_counter()
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, search)
        except Exception as error:
            if isinstance(error, UserError) and len(batch) > 1:  # one of them is at fault, not the index
                for request in batch:
                    await self._answer([request])
                return
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        self._observe(len(queries), time.perf_counter() - started)
        results = iter(found)
        for request in batch:
            own = [next(results) for _ in request.queries]
            if not request.answer.done():  # else: its client has left
                request.answer.set_result(own)

    def _next(self) -> list[_Search]:
        """Take the oldest request, and the others that want as many passages, as far as they fit."""
        first = self._waiting.popleft()
        batch, room, left = [first], self._largest - len(first.queries), deque[_Search]()
        for request in self._waiting:
            if request.top_k == first.top_k and len(request.queries) <= room:
                batch.append(request)
                room -= len(request.queries)
            else:
                left.append(request)
        self._waiting = left
        return batch

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def _searchable(query: object) -> object:
    """Refuse a query that would fail a search that other clients share, or hold it up."""
    if isinstance(query, str):
        if any("\ud800" <= character <= "\udfff" for character in query):
            raise ValueError("not valid Unicode: half a surrogate pair")
        if len(query) > MAX_QUERY:
            raise ValueError(f"{len(query):,} characters; at most {MAX_QUERY:,} are searched for")
    return query


class RetrieveRequest(BaseModel):
    queries: Annotated[list[Annotated[str, BeforeValidator(_searchable)]], Field(max_length=MAX_QUERIES)]
    topk: Annotated[int | None, Field(ge=0, le=MAX_TOP_K)] = None
    return_scores: bool = False


class Metrics:
    """The service's metrics for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "dgpo_retriever"
        self.requests = Counter(
            f"{name}_requests", "Answers of /retrieve", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            f"{name}_request_seconds", "Time to answer /retrieve", registry=self.registry
        )
        self.search_seconds = Histogram(
            f"{name}_search_seconds", "Time of one search of a batch", registry=self.registry
        )
        self.batch = Histogram(
            f"{name}_batch_queries",
            "Queries in one search",
            buckets=[2**n for n in range(14)],
            registry=self.registry,
        )
        self.waiting = Gauge(f"{name}_waiting_queries", "Queries that wait", registry=self.registry)

    def observe(self, queries: int, seconds: float) -> None:
        self.batch.observe(queries)
        self.search_seconds.observe(seconds)


class RetrieverService:
    """The state of the service: loading its index until `open` is called, then ready, then closed."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self.metrics = Metrics()
        self.index: Index | None = None
        self.passages = 0
        self.batcher: Batcher | None = None
        self.metrics.waiting.set_function(lambda: self.batcher.waiting if self.batcher else 0)

    def open(self, index: Index, passages: int) -> None:
        self.index, self.passages = index, passages
        self.batcher = Batcher(index, LARGEST_BATCH, self.metrics.observe)

    def close(self) -> None:
        """Release the index's files and connections, after the last request."""
        if self.batcher is not None:
            self.batcher.close()
        if self.index is not None:
            self.index.close()


def make_app(service: RetrieverService) -> FastAPI:
    """Make the web application of `service`, which says that it is not ready until it is opened."""
    app = FastAPI(title="DGPO retriever", docs_url=None, redoc_url=None)

    @app.post("/retrieve")
    async def retrieve(body: RetrieveRequest) -> Response:
        if service.index is None or service.batcher is None:
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, "the index is being loaded (see /health)")
        if service.batcher.waiting > MAX_WAITING:
            return _problem(HTTPStatus.TOO_MANY_REQUESTS, "too many queries are waiting; try again soon")
        try:
            found = await service.batcher.search(body.queries, body.topk or service.top_k)
        except UserError as error:
            return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error))
        except InfrastructureError as error:
            return _problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except Exception as error:
            log.error("a search ended with a bug", exc_info=error)
            return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an error in the service; its log says more")
        result = [[_item(hit, body.return_scores) for hit in hits] for hits in found]
        return JSONResponse({"result": result}, headers={INDEX_HEADER: service.index.digest})

    @app.get("/health")
    async def health() -> Response:
        """Answer 200 when queries are answered, 503 while the index is loaded."""
        if service.index is None:
            return JSONResponse({"status": "loading"}, HTTPStatus.SERVICE_UNAVAILABLE)
        known = {"index": service.index.digest, "passages": service.passages, "topk": service.top_k}
        return JSONResponse({"status": "ready", **known})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(BodyFilter, largest=MAX_BODY, refusal=refusal)

    @app.middleware("http")
    async def count(request: Request, call: Any) -> Response:
        started = time.perf_counter()
        response: Response = await call(request)
        if request.url.path == "/retrieve":
            service.metrics.requests.labels(response.status_code).inc()
            service.metrics.seconds.observe(time.perf_counter() - started)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, caught: RequestValidationError) -> Response:
        first = caught.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return _problem(
            HTTPStatus.UNPROCESSABLE_ENTITY, f"{place}: {first['msg'].removeprefix('Value error, ')}"
        )

    return app


def _item(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = hit.passage.to_json()
    return {"document": document, "score": hit.score} if with_score else document


def refusal(message: str, _code: str) -> dict[str, Any]:
    """Return the body of an error, as this service says it."""
    return {"detail": message}


def _problem(status: HTTPStatus, reason: str) -> JSONResponse:
    later = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
    headers = {"Retry-After": "5"} if status in later else None
    return JSONResponse({"detail": reason}, status, headers)
