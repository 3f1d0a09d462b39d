"""A Qdrant server over HTTP for the tests: the real one's requests, checked and answered.

Bodies are parsed by the models that Qdrant publishes with its client, which refuse unknown keys. Behind them
is the client's in-memory engine, so that what is stored, counted and found is computed and not made up. What
that engine does not have is played: optimisers (yellow for some looks), snapshots (a copy), a key, failures.
It is no substitute for a run against a real server: tests/dgpo_core/retrieval/test_real_server.py.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from qdrant_client import QdrantClient, models

from tests.web import served


@dataclass
class QdrantServer:
    """`requests`: (method and path, body) of what was asked; `busy`: looks that will say yellow."""

    version: str = "1.20.0"
    key: str | None = None
    url: str = ""
    engine: QdrantClient = field(default_factory=lambda: QdrantClient(":memory:"))
    requests: list[tuple[str, Any]] = field(default_factory=list)
    busy: int = 0
    largest: int = 33_554_432  # bytes of a request: 32 MiB, as the real one's default
    failing: int = 0  # upserts that will be answered with 503
    red: bool = False
    lost: bool = False  # upserts that are acknowledged and forgotten
    inexact: bool = False  # searches through the index miss the best point
    snapshots: dict[str, Any] = field(default_factory=dict)

    def bodies(self, request: str) -> list[Any]:
        return [body for name, body in self.requests if name.startswith(request)]


def _answer(result: Any) -> Response:
    if hasattr(result, "model_dump"):
        result = result.model_dump(mode="json")
    return JSONResponse({"result": result, "status": "ok", "time": 0.0})


def make_app(server: QdrantServer) -> FastAPI:
    app = FastAPI()
    engine, lock = server.engine, threading.Lock()
    stored: dict[str, Any] = engine._client.collections  # type: ignore[attr-defined]

    def record(request: Request, body: Any = None) -> None:
        server.requests.append((f"{request.method} {request.url.path}", body))

    @app.middleware("http")
    async def check_key(request: Request, call: Any) -> Response:
        if server.key is not None and request.headers.get("api-key") != server.key:
            return JSONResponse({"status": {"error": "Invalid API key or JWT"}}, 401)
        if (size := int(request.headers.get("content-length", 0))) > server.largest:
            reason = f"JSON payload ({size} bytes) is larger than allowed (limit: {server.largest} bytes)."
            return JSONResponse({"status": {"error": f"Payload error: {reason}"}}, 400)
        response: Response = await call(request)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"status": {"error": f"Format error in JSON body: {error.errors()}"}}, 400)

    @app.exception_handler(ValueError)
    async def refused(_request: Request, error: ValueError) -> Response:
        return JSONResponse({"status": {"error": str(error)}}, 404)

    @app.get("/")
    def root() -> Any:
        return {"title": "qdrant - vector search engine", "version": server.version}

    @app.get("/collections")
    def collections() -> Response:
        return _answer(engine.get_collections())

    @app.get("/collections/{name}/exists")
    def exists(name: str) -> Response:
        return _answer({"exists": engine.collection_exists(name)})

    @app.get("/collections/{name}")
    def info(name: str) -> Response:
        found = engine.get_collection(name)
        if server.busy:
            server.busy -= 1
            found.status = models.CollectionStatus.YELLOW
        if server.red:
            found.status = models.CollectionStatus.RED
        return _answer(found)

    @app.put("/collections/{name}")
    def create(name: str, body: models.CreateCollection, request: Request) -> Response:
        record(request, body)
        made = engine.create_collection(
            name,
            vectors_config=body.vectors,
            sparse_vectors_config=body.sparse_vectors,
            metadata=body.metadata,
        )
        return _answer(made)

    @app.patch("/collections/{name}")
    def update(name: str, body: models.UpdateCollection, request: Request) -> Response:
        record(request, body)
        return _answer(engine.collection_exists(name))

    @app.delete("/collections/{name}")
    def delete(name: str, request: Request) -> Response:
        record(request)
        return _answer(engine.delete_collection(name))

    @app.put("/collections/{name}/points")
    def upsert(name: str, body: models.PointsList, request: Request) -> Response:
        record(request, body)
        if server.failing:
            server.failing -= 1
            return JSONResponse({"status": {"error": "Service internal error: restarting"}}, 503)
        with lock:
            if not server.lost:
                engine.upsert(name, body.points)
        return _answer({"operation_id": 1, "status": "completed"})

    @app.post("/collections/{name}/points/count")
    def count(name: str, body: models.CountRequest, request: Request) -> Response:
        record(request, body)
        with lock:
            return _answer(engine.count(name, count_filter=body.filter, exact=bool(body.exact)))

    @app.post("/collections/{name}/points/query/batch")
    def query(name: str, body: models.QueryRequestBatch, request: Request) -> Response:
        record(request, body)
        with lock:
            found = engine.query_batch_points(name, body.searches)
        for search, response in zip(body.searches, found, strict=True):
            if server.inexact and not (search.params and search.params.exact):
                del response.points[0]
        return _answer([response.model_dump(mode="json") for response in found])

    @app.get("/aliases")
    def aliases() -> Response:
        return _answer(engine.get_aliases())

    @app.post("/collections/aliases")
    def change_aliases(body: models.ChangeAliasesOperation, request: Request) -> Response:
        record(request, body)
        return _answer(engine.update_collection_aliases(body.actions))

    @app.post("/collections/{name}/snapshots")
    def snapshot(name: str, request: Request) -> Response:
        record(request)
        found = f"{name}-1.snapshot"
        server.snapshots[found] = copy.deepcopy(stored[name])
        return _answer(models.SnapshotDescription(name=found, size=1234))

    @app.put("/collections/{name}/snapshots/recover")
    def recover(name: str, body: models.SnapshotRecover, request: Request) -> Response:
        record(request, body)
        stored[name] = server.snapshots[body.location.rsplit("/", 1)[1]]
        return _answer(True)

    return app


@contextmanager
def running(server: QdrantServer) -> Iterator[QdrantServer]:
    """Serve on a free port until the end of the block; `server.url` says where."""
    with served(make_app(server)) as server.url:
        yield server
