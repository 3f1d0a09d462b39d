"""Against a real Qdrant server, where DGPO_TEST_QDRANT names one (http://127.0.0.1:6333); skipped elsewhere.

    docker run --rm -p 6333:6333 -p 6334:6334 qdrant/qdrant:v1.20.0
    DGPO_TEST_QDRANT=http://127.0.0.1:6333 pytest tests/dgpo_core/retrieval/test_real_server.py

Collections of its own are made and removed. With a server that wants a key: QDRANT_API_KEY.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.collection import Backend, Content
from dgpo_core.retrieval.embedded import EmbeddedBackend
from dgpo_core.retrieval.encoders import Bm25Encoder
from dgpo_core.retrieval.qdrant_server import (
    QdrantBackend,
    alias_target,
    collection_name,
    connect,
    ensure,
    list_collections,
    restore_collection,
    snapshot_collection,
)
from dgpo_core.retrieval.ranking import Query, rank
from tests.dgpo_core.retrieval.conftest import content

URL = os.environ.get("DGPO_TEST_QDRANT", "")
pytestmark = pytest.mark.skipif(not URL, reason="DGPO_TEST_QDRANT names no server")


def clustered(count: int, size: int) -> tuple[Content, np.ndarray]:
    """Vectors around common centres, as an encoder's are; random ones are the worst case of any index."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(200, size))
    matrix = (centres[rng.integers(200, size=count)] + 0.7 * rng.normal(size=(count, size))).astype(
        np.float32
    )
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    passages = [Passage(str(i), "T", "text") for i in range(count)]
    return replace(content(passages, matrix.tolist(), size, parts=5), name="dgpo-test-real"), matrix


def cleaned(config: QdrantConfig, name: str) -> Any:
    client = connect(URL, config)
    for collection in client.get_collections().collections:
        if collection.name.startswith(name):
            client.delete_collection(collection.name)
    return client


@pytest.mark.parametrize("grpc", [False, True])
@pytest.mark.parametrize("quantization", ["none", "int8", "binary"])
def test_load_search_recall(grpc: bool, quantization: Any) -> None:
    """30,000 x 384 are enough to be indexed and quantised (20,000 kB a segment)."""
    made, matrix = clustered(30_000, 384)
    config = QdrantConfig(grpc=grpc, quantization=quantization, shards=2, upload_batch=500)
    client = cleaned(config, made.name)
    told: list[str] = []
    ensure(client, made, config, lambda done, total, what: told.append(what), lambda name: None)
    assert {"uploading", "indexing"} == set(told)
    info = client.get_collection(made.name)
    assert info.points_count == 30_000
    assert info.indexed_vectors_count > 0
    assert info.config.params.vectors["text"].datatype == "float16"
    backend = QdrantBackend(client, made.name, config)
    asked = matrix[::300] + 0.02 * np.random.default_rng(1).normal(size=(100, 384)).astype(np.float32)
    found = backend.search(Query("text", asked.tolist(), 3))
    exact = backend.search(Query("text", asked.tolist(), 3, exact=True))
    truth = np.argsort(-(asked @ matrix.T), axis=1)[:, :3]
    oracle = [len({p.number for p in ps} & set(best)) for ps, best in zip(exact, truth.tolist(), strict=True)]
    assert np.mean(oracle) / 3 > 0.99, "only float16 stands between exact search and numpy"
    shares = [
        len({p.number for p in some} & {p.number for p in best}) / 3
        for some, best in zip(found, exact, strict=True)
    ]
    assert np.mean(shares) > (0.9 if quantization == "binary" else 0.97)
    cleaned(config, made.name)


def test_sparse_is_what_the_embedded_engine_finds(
    passages: list[Passage], queries: list[tuple[str, str]]
) -> None:
    encoder = Bm25Encoder(30.0)
    made = content(passages, encoder.encode_passages([p.contents for p in passages]), None)
    made = replace(made, name="dgpo-test-sparse")
    config = QdrantConfig()
    client = cleaned(config, made.name)
    ensure(client, made, config, lambda *_: None, lambda name: None)
    asked = encoder.encode_queries([query for query, _ in queries[:100]])
    backends: list[Backend] = [QdrantBackend(client, made.name, config), EmbeddedBackend(made)]
    first, second = (rank(b.search, Query("text", asked, 3)) for b in backends)
    assert [[p.number for p in ps] for ps in first] == [[p.number for p in ps] for ps in second]
    for some, same in zip(first, second, strict=True):
        assert [p.score for p in some] == pytest.approx([p.score for p in same], rel=1e-5)
    cleaned(config, made.name)


def test_killed_load_new_build_snapshot(passages: list[Passage]) -> None:
    made, _ = clustered(2_000, 16)
    old, new = QdrantConfig(), QdrantConfig(hnsw_m=8)
    client = cleaned(old, made.name)
    name = collection_name(made.name, old)

    def die(done: int, total: int, what: str) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(client, made, old.model_copy(update={"upload_parallel": 1}), die, lambda name: None)
    assert alias_target(client, made.name) is None
    ensure(client, made, old, lambda *_: None, lambda name: None)
    ensure(client, made, new, lambda *_: None, lambda name: None)
    assert alias_target(client, made.name) == collection_name(made.name, new)
    kept = snapshot_collection(client, name)
    source = f"{URL}/collections/{name}/snapshots/{kept.name}"
    restore_collection(client, name, source)
    assert client.count(name, exact=True).count == 2_000
    assert {c.alias for c in list_collections(client) if c.name.startswith(made.name)} == {None, made.name}
    cleaned(old, made.name)
