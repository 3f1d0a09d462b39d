"""Search in real Qdrant collections: embedded, and through a client."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, write_jsonl
from dgpo_core.datasets.world.articles import Article
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.encoders import Bm25Encoder, Vector
from dgpo_core.retrieval.index import (
    EmbeddedBackend,
    Index,
    Point,
    ServerBackend,
    best_hits,
    connect,
    index_passages,
    open_index,
)
from dgpo_core.retrieval.shards import Manifest, build_shards

BM25 = EncoderConfig(kind="bm25")


@pytest.fixture(scope="module")
def passages(articles: list[Article]) -> list[Passage]:
    return [p for article in articles for p in article.passages]


@pytest.fixture(scope="module")
def queries(articles: list[Article]) -> list[tuple[str, str]]:
    """(well-formed query, id of the passage with the fact) for every fact."""
    return [
        (fact.relation.noun_phrase(fact.subject.mention).removeprefix("the "), passage.id)
        for article in articles
        for passage, facts in zip(article.passages, article.facts, strict=True)
        for fact in facts
    ]


def test_recall_of_single_hop_queries(index: Index, queries: list[tuple[str, str]]) -> None:
    found = index.search([query for query, _ in queries], 3)
    hits = [gold in {hit.passage.id for hit in hits} for (_, gold), hits in zip(queries, found, strict=True)]
    assert len(hits) > 500
    assert np.mean(hits) >= 0.95
    for result in found:
        assert len(result) == 3
        assert [hit.score for hit in result] == pytest.approx(
            sorted((hit.score for hit in result), reverse=True)
        )


def test_scores_are_bm25(index: Index, passages: list[Passage], queries: list[tuple[str, str]]) -> None:
    """Qdrant's scores against sums over all passages, with its IDF: ln((N - n + 0.5) / (n + 0.5) + 1)."""
    average = sum(len(p.contents.split()) for p in passages) / len(passages)
    encoder = Bm25Encoder(average)
    weights = [
        dict(zip(v.indices, v.values, strict=True))  # type: ignore[union-attr]
        for v in encoder.encode_passages([p.contents for p in passages])
    ]
    for query in (queries[0][0], queries[321][0]):
        terms = encoder.encode_queries([query])[0].indices  # type: ignore[union-attr]
        containing = {term: sum(term in w for w in weights) for term in terms}
        idf = {t: np.log((len(passages) - n + 0.5) / (n + 0.5) + 1) for t, n in containing.items()}
        scores = [sum(idf[t] * w.get(t, 0.0) for t in terms) for w in weights]
        (hits,) = index.search([query], 5)
        assert [h.score for h in hits] == pytest.approx(sorted(scores, reverse=True)[:5], rel=1e-3)
        by_id = dict(zip((p.id for p in passages), scores, strict=True))
        assert [by_id[h.passage.id] for h in hits] == pytest.approx([h.score for h in hits], rel=1e-3)


def points(passages: list[Passage], vectors: list[Vector]) -> Iterator[Point]:
    return ((i, p, v) for i, (p, v) in enumerate(zip(passages, vectors, strict=True)))


def test_backends_agree_on_sparse_vectors(passages: list[Passage], queries: list[tuple[str, str]]) -> None:
    encoder = Bm25Encoder(30.0)
    part = passages[:150]
    vectors = encoder.encode_passages([p.contents for p in part])
    manifest = Manifest("c", "d", len(part), 30.0, None, {}, [])
    asked = encoder.encode_queries([query for query, _ in queries[:40]])
    embedded, server = EmbeddedBackend(), ServerBackend(QdrantClient(":memory:"))
    for backend in (embedded, server):
        backend.fill(points(part, vectors), manifest)
    pairs = zip(best_hits(embedded, asked, 3), best_hits(server, asked, 3), strict=True)
    for first, second in pairs:
        assert [hit.score for hit in first] == pytest.approx([hit.score for hit in second], rel=1e-4)
        assert [hit.passage.id for hit in first] == [hit.passage.id for hit in second]


def test_ties_are_cut_in_the_order_of_the_corpus(index: Index) -> None:
    """Forty equal passages, more than are fetched at first, inserted among better and worse ones."""
    texts = (
        ["red house"] * 20
        + ["red red house"]
        + ["red house"] * 20
        + ["red and a very long text of a house"] * 3
    )
    part = [Passage(f"p{i}", "T", text) for i, text in enumerate(texts)]
    for _ in range(3):
        made = index_passages(part, BM25)
        (hits,) = made.search(["red"], 5)
        assert [hit.passage.id for hit in hits] == ["p20", "p0", "p1", "p2", "p3"]


def test_every_build_gives_the_same_hits(
    index: Index, passages: list[Passage], queries: list[tuple[str, str]]
) -> None:
    asked = [query for query, _ in queries]
    again = index_passages(passages, BM25).search(asked, 3)
    first = index.search(asked, 3)
    assert [[h.passage.id for h in hits] for hits in again] == [
        [h.passage.id for h in hits] for hits in first
    ]


@pytest.mark.parametrize("make", [EmbeddedBackend, lambda: ServerBackend(QdrantClient(":memory:"))])
def test_dense_vectors_are_ranked_by_inner_product(
    make: type[EmbeddedBackend], passages: list[Passage]
) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(60, 8)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    backend = make()
    backend.fill(points(passages[:60], matrix.tolist()), Manifest("c", "d", 60, 30.0, 8, {}, []))
    asked = rng.normal(size=(5, 8)).astype(np.float32)
    for query, hits in zip(asked, best_hits(backend, asked.tolist(), 4), strict=True):
        scores = matrix @ query
        best = np.argsort(-scores)[:4]
        assert [hit.passage.id for hit in hits] == [passages[i].id for i in best]
        assert [hit.score for hit in hits] == pytest.approx(scores[best].tolist(), rel=1e-4)


def test_server_collection_is_filled_once(passages: list[Passage]) -> None:
    client = QdrantClient(":memory:")
    vectors = Bm25Encoder(30.0).encode_passages([p.contents for p in passages[:20]])
    manifest = Manifest("c", "d", 20, 30.0, None, {}, [])
    ServerBackend(client).fill(points(passages[:7], vectors[:7]), manifest)  # killed after seven
    ServerBackend(client).fill(points(passages[:20], vectors), manifest)
    assert client.count("c").count == 20

    def explode() -> Iterator[Point]:
        raise AssertionError("a complete collection was read again")
        yield

    ServerBackend(client).fill(explode(), manifest)


def test_index_from_disk_is_that_from_memory(
    index: Index, passages: list[Passage], queries: list[tuple[str, str]], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", passages)
    config = RetrievalConfig(encoder=BM25, shard_size=150)
    manifest = build_shards(tmp_path / "corpus.jsonl", tmp_path / "index", config, lambda *_: None)
    opened = open_index(tmp_path / "index", "embedded")
    assert opened.digest == manifest.digest
    asked = [query for query, _ in queries[:30]]
    first, second = opened.search(asked, 3), index.search(asked, 3)
    assert [[h.passage for h in hits] for hits in first] == [[h.passage for h in hits] for hits in second]


def test_same_query_is_asked_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    backend = index._backend
    query = backend.query
    monkeypatch.setattr(backend, "query", lambda v, limit: asked.append(len(v)) or query(v, limit))  # type: ignore[func-returns-value]
    first, second, third = index.search(["some odd film", "other person", "some odd film"], 2)
    assert first == third != second
    assert index.search(["other person"], 2) == [second]
    assert len(index.search(["other person"], 1)[0]) == 1
    assert asked == [2, 1]


def test_query_without_any_known_word(index: Index) -> None:
    assert index.search(["zzzzqqq"], 3) == [[]]
    assert index.search([], 3) == []


def test_failing_backend_is_an_infrastructure_error(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(vectors: list[Vector], limit: int) -> None:
        raise OSError("gone")

    monkeypatch.setattr(index._backend, "query", fail)
    with pytest.raises(InfrastructureError, match="the Qdrant index failed: gone"):
        index.search(["a query that nobody asked"], 3)


def test_unreachable_server(tmp_path: Path, passages: list[Passage]) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", passages[:3])
    build_shards(
        tmp_path / "corpus.jsonl", tmp_path / "index", RetrievalConfig(encoder=BM25), lambda *_: None
    )
    with pytest.raises(
        InfrastructureError, match=r"cannot fill the Qdrant collection at http://127\.0\.0\.1:9"
    ):
        open_index(tmp_path / "index", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="run the index stage first"):
        open_index(tmp_path / "none", "embedded")


def test_the_servers_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wants a key is asked with it, and nothing else says it."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("api-key"))
            body = b'{"result": {"collections": []}, "status": "ok", "time": 0}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for key in (None, "sesame"):
            if key:
                monkeypatch.setenv("QDRANT_API_KEY", key)
            client = connect(f"http://127.0.0.1:{server.server_port}")
            client.get_collections()
            assert keys[-1] == key
        server.shutdown()
