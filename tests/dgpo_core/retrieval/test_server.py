"""The client of a Qdrant server: TLS, gRPC and the key reach the wire."""

import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from qdrant_client import grpc as messages
from qdrant_client.grpc.points_service_pb2_grpc import PointsServicer, add_PointsServicer_to_server

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.retrieval.encoders import SparseVector
from dgpo_core.retrieval.qdrant_server import QdrantBackend, connect


class Points(PointsServicer):
    """Answers each query with the point 7, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.keys: list[str | None] = []

    def QueryBatch(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("api-key"))
        payload = {
            name: messages.Value(string_value=text)
            for name, text in {"id": "p7", "title": "T", "text": "red"}.items()
        }
        point = messages.ScoredPoint(id=messages.PointId(num=7), score=0.5, payload=payload)
        return messages.QueryBatchResponse(result=[messages.BatchResult(result=[point])] * 2)


@pytest.fixture
def grpc_server() -> Iterator[tuple[Points, int]]:
    points = Points()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_PointsServicer_to_server(points, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield points, port
    server.stop(None)


def test_grpc(grpc_server: tuple[Points, int], monkeypatch: pytest.MonkeyPatch) -> None:
    points, port = grpc_server
    monkeypatch.setenv("QDRANT_API_KEY", "sesame")
    config = QdrantConfig(grpc=True, grpc_port=port)
    backend = QdrantBackend(connect("http://127.0.0.1:9", config), "wiki", config)
    dense, sparse = [0.5, 0.25], SparseVector([3, 9], [1.0, 0.5])
    for vector in (dense, sparse):
        found = backend.query("text", [vector, vector], 4)
        assert [(p.number, p.passage.id, p.score) for p in found[1]] == [(7, "p7", 0.5)]
    first, second = points.asked
    assert (first.collection_name, len(first.query_points), first.query_points[0].limit) == ("wiki", 2, 4)
    assert list(first.query_points[0].query.nearest.dense.data) == dense
    assert first.query_points[0].params.quantization.oversampling == 3.0
    assert list(second.query_points[0].query.nearest.sparse.indices) == sparse.indices
    assert points.keys == ["sesame", "sesame"]


def test_https_is_tls_for_grpc_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "sesame")
    client = connect("https://qdrant.example:6333/prefix", QdrantConfig(grpc=True))
    remote = client._client
    assert remote.rest_uri == "https://qdrant.example:6333/prefix"  # type: ignore[attr-defined]
    assert remote._https  # type: ignore[attr-defined]
    client.close()
    assert threading.active_count() < 50
