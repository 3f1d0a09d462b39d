"""A collection on a Qdrant server: how it is asked, built, listed, removed and brought back; gRPC and TLS."""

import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as messages
from qdrant_client.grpc.points_service_pb2_grpc import PointsServicer, add_PointsServicer_to_server

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval import qdrant_server
from dgpo_core.retrieval.collection import Content
from dgpo_core.retrieval.encoders import Bm25Encoder, SparseVector
from dgpo_core.retrieval.qdrant_server import (
    QdrantBackend,
    alias_target,
    collection_name,
    connect,
    ensure,
    list_collections,
    remove_collection,
    restore_collection,
    snapshot_collection,
)
from dgpo_core.retrieval.ranking import Query
from tests.dgpo_core.retrieval.conftest import content, dense_content
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer

CONFIG = QdrantConfig(upload_batch=7, upload_parallel=3)


def filled(
    server: QdrantServer, made: Content, config: QdrantConfig = CONFIG, accepted: list[str] | None = None
) -> tuple[QdrantClient, list[tuple[int, int, str]]]:
    """A client of the filled server, and the progress that was told."""
    told: list[tuple[int, int, str]] = []
    client = connect(server.url, config)
    ensure(client, made, config, lambda *p: told.append(p), (accepted if accepted is not None else []).append)
    return client, told


def creation(server: QdrantServer) -> Any:
    """How the one collection was created."""
    (body,) = [b for b in server.bodies("PUT /collections") if isinstance(b, models.CreateCollection)]
    return body


def test_the_order_of_things(qdrant: QdrantServer, passages: list[Passage]) -> None:
    made, matrix = dense_content(passages[:60])
    name, accepted = collection_name(made.name, CONFIG), list[str]()
    qdrant.busy = 6
    client, told = filled(qdrant, made, accepted=accepted)
    kinds = [request for request, _ in qdrant.requests if "count" not in request]
    assert kinds[0] == f"PUT /collections/{name}"
    assert set(kinds[1:-2]) == {f"PUT /collections/{name}/points"}
    assert kinds[-2:] == [f"PATCH /collections/{name}", "POST /collections/aliases"]
    assert accepted == [name]
    assert alias_target(client, made.name) == name
    assert qdrant.busy == 0, "it waited for the optimisers"
    assert [t for t in told if t[2] == "uploading"][-1] == (60, 60, "uploading")
    assert len([t for t in told if t[2] == "indexing"]) >= 6 + qdrant_server.CALM
    assert max(len(body.points) for body in qdrant.bodies(f"PUT /collections/{name}/points")) == 7
    asked = len(qdrant.requests)
    filled(qdrant, replace(made, parts=[]))
    assert len(qdrant.requests) == asked, "a complete one is left alone"
    points = QdrantBackend(client, made.name, CONFIG).search(Query("text", [matrix[5].tolist()], 3))[0]
    assert [p.number for p in points] == np.argsort(-(matrix @ matrix[5]))[:3].tolist()


@pytest.mark.parametrize("quantization", ["none", "int8", "binary"])
def test_a_dense_collection(qdrant: QdrantServer, passages: list[Passage], quantization: Any) -> None:
    made, matrix = dense_content(passages[:10])
    config = QdrantConfig(shards=6, replicas=2, quantization=quantization, hnsw_m=24, hnsw_ef=77)
    client, _ = filled(qdrant, made, config)
    created = creation(qdrant)
    vector = created.vectors["text"]
    assert (vector.size, vector.distance) == (8, models.Distance.DOT)
    assert (vector.datatype, vector.memory) == (models.Datatype.FLOAT16, models.Memory.COLD)
    match quantization:
        case "none":
            assert vector.quantization_config is None
        case "int8":
            assert vector.quantization_config.scalar.type is models.ScalarType.INT8
            assert vector.quantization_config.scalar.memory is models.Memory.PINNED
        case "binary":
            assert vector.quantization_config.binary.memory is models.Memory.PINNED
    assert (created.shard_number, created.replication_factor) == (6, 2)
    assert created.hnsw_config.m == 0, "no graph is built while it is loaded"
    assert created.metadata["dgpo"]["digest"] == made.digest
    (updated,) = qdrant.bodies("PATCH /collections")
    assert updated.hnsw_config.m == 24
    backend = QdrantBackend(client, made.name, config)
    backend.search(Query("text", matrix[:2].tolist(), 3))
    backend.search(Query("text", matrix[:2].tolist(), 3, exact=True))
    both, *alone = [body.searches for body in qdrant.bodies("POST /collections") if hasattr(body, "searches")]
    assert [len(searches) for searches in (both, *alone)] == [2, 1, 1]
    params = both[0].params
    assert params.hnsw_ef == 77
    if quantization == "none":
        assert params.quantization is None
    else:
        assert (params.quantization.rescore, params.quantization.oversampling) == (True, 3.0)
    assert alone[0][0].params.exact
    assert alone[0][0].params.quantization.ignore


def test_a_sparse_collection(qdrant: QdrantServer, passages: list[Passage]) -> None:
    vectors = Bm25Encoder(30.0).encode_passages([p.contents for p in passages[:10]])
    filled(qdrant, content(passages[:10], vectors, None))
    created = creation(qdrant)
    assert not created.vectors
    assert created.sparse_vectors["text"].modifier is models.Modifier.IDF


def test_a_load_that_was_killed_goes_on(qdrant: QdrantServer, passages: list[Passage]) -> None:
    """The first part is there, of the second a few points: only the second and third are sent again."""
    made, _ = dense_content(passages[:60])
    name = collection_name(made.name, CONFIG)
    client = connect(qdrant.url, CONFIG)
    qdrant_server.create(client, name, made, CONFIG)
    some = [point for point in made.points() if point.number < 25]
    client.upsert(name, [qdrant_server._struct(point) for point in some])
    qdrant.requests.clear()
    _, told = filled(qdrant, made)
    sent = sorted(p.id for body in qdrant.bodies(f"PUT /collections/{name}/points") for p in body.points)
    assert sent == list(range(20, 60))
    assert told[0] == (20, 60, "uploading")
    assert client.count(made.name).count == 60


def test_a_server_that_restarts_is_waited_for(
    qdrant: QdrantServer, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_server, "LONGEST_WAIT", 0.01)
    made, _ = dense_content(passages[:60])
    qdrant.failing = 5
    client, _ = filled(qdrant, made)
    assert client.count(made.name).count == 60
    qdrant.failing = 1000
    with pytest.raises(Exception, match="restarting"):
        filled(qdrant, replace(made, name="dgpo-again"))
    assert alias_target(client, "dgpo-again") is None
    assert threading.active_count() < 50, "the other uploads have stopped"


def test_what_the_server_refuses_is_not_repeated(qdrant: QdrantServer, passages: list[Passage]) -> None:
    made, _ = dense_content(passages[:4])
    client = connect(qdrant.url, CONFIG)
    with pytest.raises(Exception, match="404"):
        qdrant_server.upload(client, "no-such-collection", made, CONFIG, lambda *_: None)
    refused = [r for r, _ in qdrant.requests if "no-such-collection" in r]
    assert len(refused) <= 2


def test_requests_are_cut_by_their_bytes_too(
    qdrant: QdrantServer, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server takes 32 MiB; here 4,000 bytes are enough to see it, of text that grows when it is escaped."""
    monkeypatch.setattr(qdrant_server, "REQUEST_BYTES", 4000)
    long = [Passage(f"{i}", "\x01" * 20, "é\n\x02" * (30 if i else 400)) for i in range(20)]
    made, matrix = dense_content(long, parts=1)
    qdrant.largest = 4000
    with pytest.raises(
        UserError, match=r"retrieval\.qdrant\.upload_batch: 1 passages from '0' on.*HTTP 400.*limit"
    ):
        filled(qdrant, made)
    qdrant.largest = 8000
    client, _ = filled(qdrant, replace(made, name="dgpo-second"))
    assert client.count("dgpo-second").count == 20
    sent = [
        len(body.points) for body in qdrant.bodies("PUT /collections/dgpo-second-") if hasattr(body, "points")
    ]
    assert sent[0] == 1
    assert max(sent) <= CONFIG.upload_batch
    monkeypatch.setattr(qdrant_server, "REQUEST_BYTES", 500)
    found = QdrantBackend(client, "dgpo-second", CONFIG).search(Query("text", matrix.tolist(), 1))
    assert [points[0].number for points in found] == list(range(20))
    assert max(len(body.searches) for body in qdrant.bodies("POST /coll") if hasattr(body, "searches")) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lost", "has 0 points instead of 12 after the upload"),
        ("red", "Qdrant cannot index dgpo-test-0123-"),
    ],
)
def test_a_collection_with_a_fault_has_no_readers(
    qdrant: QdrantServer, passages: list[Passage], fault: str, message: str
) -> None:
    setattr(qdrant, fault, True)
    made, _ = dense_content(passages[:12])
    with pytest.raises(InfrastructureError, match=message):
        filled(qdrant, made)
    assert alias_target(qdrant.engine, made.name) is None


def test_the_name_says_content_and_build() -> None:
    assert collection_name("a", QdrantConfig()).startswith("a-")
    searched = QdrantConfig(hnsw_ef=500, oversampling=9.0, upload_parallel=1, grpc=True)
    assert collection_name("a", searched) == collection_name("a", QdrantConfig())
    built = [QdrantConfig(shards=2), QdrantConfig(quantization="binary"), QdrantConfig(hnsw_m=8)]
    assert len({collection_name("a", config) for config in (QdrantConfig(), *built)}) == 4


OLD, NEW = QdrantConfig(quantization="binary"), QdrantConfig()


def test_the_old_one_can_be_removed_and_brought_back(qdrant: QdrantServer, passages: list[Passage]) -> None:
    made, _ = dense_content(passages[:12])
    client = connect(qdrant.url, NEW)
    stranger = models.VectorParams(size=2, distance=models.Distance.DOT)
    client.create_collection("somebody-elses", vectors_config=stranger)
    for config in (OLD, NEW):
        ensure(client, made, config, lambda *_: None, lambda name: None)
    old, new = (collection_name(made.name, config) for config in (OLD, NEW))
    found = {c.name: c for c in list_collections(client)}
    assert {name: c.alias for name, c in found.items()} == {old: None, new: made.name}
    assert {(c.points, c.status, c.digest) for c in found.values()} == {(12, "green", made.digest)}
    with pytest.raises(UserError, match=f"{new}: readers use it, as {made.name}"):
        remove_collection(client, new)
    with pytest.raises(UserError, match="somebody-elses: no collection of this pipeline"):
        remove_collection(client, "somebody-elses")
    kept = snapshot_collection(client, old)
    remove_collection(client, old)
    assert [c.name for c in list_collections(client)] == [new]
    restore_collection(client, old, f"file:///snapshots/{kept.name}")
    qdrant.requests.clear()
    ensure(client, made, OLD, lambda *_: None, lambda name: None)
    assert not qdrant.bodies(f"PUT /collections/{old}/points"), "nothing is uploaded again"
    assert {c.name: c.alias for c in list_collections(client)} == {old: made.name, new: None}


class Points(PointsServicer):
    """Answers each query with the point 7, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.keys: list[str | None] = []

    def QueryBatch(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("api-key"))
        texts = {"id": "p7", "title": "T", "text": "red"}
        payload = {name: messages.Value(string_value=text) for name, text in texts.items()}
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
        found = backend.search(Query("text", [vector, vector], 4))
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
