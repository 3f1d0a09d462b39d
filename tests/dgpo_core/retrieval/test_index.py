"""The index at every location, its failures, and its recall against exact search."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from dgpo_core.config.retrieval import QdrantConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval import index as module
from dgpo_core.retrieval import qdrant_server as loading
from dgpo_core.retrieval.encoders import Bm25Encoder
from dgpo_core.retrieval.index import (
    Index,
    Recall,
    Searcher,
    index_passages,
    open_index,
    require_recall,
    search_recall,
)
from dgpo_core.retrieval.ranking import Candidate, Hit, Query
from dgpo_core.retrieval.shards import read_manifest, write_manifest
from tests.conftest import run_python
from tests.dgpo_core.retrieval.conftest import BM25
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer
from tests.web import served


def ids(found: list[list[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in hits] for hits in found]


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
    """Scores against sums over all passages, with Qdrant's IDF: ln((N - n + 0.5) / (n + 0.5) + 1)."""
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
        assert [h.score for h in hits] == pytest.approx(sorted(scores, reverse=True)[:5], abs=1e-4)
        by_id = dict(zip((p.id for p in passages), scores, strict=True))
        assert [by_id[h.passage.id] for h in hits] == pytest.approx([h.score for h in hits], abs=1e-4)


def test_every_build_gives_the_same_hits_and_scores(
    index: Index, passages: list[Passage], queries: list[tuple[str, str]]
) -> None:
    asked = [query for query, _ in queries]
    first = index.search(asked, 3)
    for _ in range(2):
        assert index_passages(passages, BM25).search(asked, 3) == first


def locations(folder: Path, server: QdrantServer) -> list[str]:
    return ["embedded", f"embedded:{folder}", "memory", server.url]


def test_every_location_finds_the_same(
    shards: Path, queries: list[tuple[str, str]], qdrant: QdrantServer, tmp_path: Path
) -> None:
    asked = [query for query, _ in queries[:40]]
    found = {}
    for location in locations(tmp_path, qdrant):
        opened = open_index(shards, RetrievalConfig(encoder=BM25, location=location))
        assert opened.digest == read_manifest(shards).digest
        found[location] = opened.search(asked, 3)
        opened.close()
    first = found["embedded"]
    for location, other in found.items():
        assert ids(other) == ids(first), location
        for some, same in zip(other, first, strict=True):
            assert [hit.score for hit in some] == pytest.approx([hit.score for hit in same], abs=2e-4)


def test_hybrid_is_the_fusion_of_both_rankings_everywhere(
    dense_shards: Path,
    passages: list[Passage],
    queries: list[tuple[str, str]],
    qdrant: QdrantServer,
    tmp_path: Path,
) -> None:
    manifest = read_manifest(dense_shards)
    asked = [query for query, _ in queries[:30]]
    base = RetrievalConfig(encoder=manifest.encoder_config)
    dense = open_index(dense_shards, base).search(asked, 50)
    lexical = index_passages(passages[:150], BM25).search(asked, 50)
    expected = []
    for both in zip(ids(dense), ids(lexical), strict=True):
        scores: dict[str, float] = {}
        for ranking in both:
            for rank, name in enumerate(ranking, 1):
                scores[name] = scores.get(name, 0.0) + 1 / (60 + rank)
        order = {p.id: i for i, p in enumerate(passages)}
        best = sorted(scores, key=lambda name: (-scores[name], order[name]))[:3]
        expected.append([(name, round(scores[name], 4)) for name in best])
    for location in locations(tmp_path, qdrant):
        config = base.model_copy(update={"hybrid": True, "location": location})
        opened = open_index(dense_shards, config)
        assert opened.digest != manifest.digest, "it finds other passages than the vectors alone"
        found = opened.search(asked, 3)
        assert [[(h.passage.id, h.score) for h in hits] for hits in found] == expected, location
        opened.close()
    assert expected != [[(h.passage.id, h.score) for h in hits[:3]] for hits in dense]


def test_same_query_is_asked_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    assert index.searcher
    hits = index.searcher.hits
    monkeypatch.setattr(index.searcher, "hits", lambda q, k: asked.append(q) or hits(q, k))  # type: ignore[func-returns-value]
    first, second, third = index.search(["some odd film", "other person", "some odd film"], 2)
    assert first == third != second
    assert index.search(["other person"], 2) == [second]
    assert len(index.search(["other person"], 1)[0]) == 1
    assert asked == [["some odd film", "other person"], ["other person"]]


def test_only_the_most_recent_queries_are_remembered(
    passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHED_QUERIES", 2)
    made = index_passages(passages[:20], BM25)
    for query in ("a film", "b person", "a film", "c company"):
        made.search([query], 1)
    assert [query for query, _ in made._cache] == ["a film", "c company"]
    assert len(made.search(["d", "e", "f"], 1)) == 3


def test_long_passages_are_not_remembered_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHED_TEXT", 5000)
    made = index_passages([Passage("1", "T", "red house " * 200), Passage("2", "T", "x " * 3000)], BM25)
    for query in ("red", "house", "red house", "a red", "a house", "x"):
        assert made.search([query], 1)[0]
        assert sum(len(hit.passage.text) for hits in made._cache.values() for hit in hits) <= 5000
    assert [query for query, _ in made._cache] == []
    made.search(["red"], 1)
    made.search(["house"], 1)
    assert [query for query, _ in made._cache] == ["red", "house"], "what there is room for"


def test_query_without_any_known_word(index: Index) -> None:
    assert index.search(["zzzzqqq"], 3) == [[]]
    assert index.search([], 3) == []


def test_failing_backend_is_an_infrastructure_error(passages: list[Passage]) -> None:
    made = index_passages(passages[:20], BM25)
    made.close()
    with pytest.raises(InfrastructureError, match="the index failed: "):
        made.search(["a query that nobody asked"], 3)


def test_unreachable_server(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InfrastructureError, match=r"cannot fill the Qdrant collection at http://127\.0\.0\.1:9"
    ):
        open_index(shards, RetrievalConfig(encoder=BM25, location="http://127.0.0.1:9"))
    with pytest.raises(UserError, match="run the index stage first"):
        open_index(tmp_path / "none", RetrievalConfig(encoder=BM25))


def test_the_servers_key_comes_from_the_environment(
    shards: Path, qdrant: QdrantServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    qdrant.key = "sesame"
    config = RetrievalConfig(encoder=BM25, location=qdrant.url)
    for key in (None, "guessed"):
        if key:
            monkeypatch.setenv("QDRANT_API_KEY", key)
        with pytest.raises(UserError, match=r"refuses the key of QDRANT_API_KEY \(HTTP 401\)"):
            open_index(shards, config)
    monkeypatch.setenv("QDRANT_API_KEY", "sesame")
    assert open_index(shards, config).search(["film"], 1)


def test_what_the_server_refuses_is_the_users(shards: Path, qdrant: QdrantServer) -> None:
    """It would be refused again: no time is lost with other attempts."""
    opened = open_index(shards, RetrievalConfig(encoder=BM25, location=qdrant.url))
    for name in [collection.name for collection in qdrant.engine.get_collections().collections]:
        qdrant.engine.delete_collection(name)
    with pytest.raises(UserError, match=r"refuses a request \(HTTP 404\): .*not found"):
        opened.search(["a query that nobody asked"], 3)


@pytest.mark.parametrize(("status", "kind"), [(404, UserError), (200, UserError), (503, InfrastructureError)])
def test_another_server_at_that_address(shards: Path, status: int, kind: type[Exception]) -> None:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "PUT", "POST"])
    def page() -> HTMLResponse:
        return HTMLResponse("<html>a page</html>", status)

    with served(app) as url, pytest.raises(kind, match=url):
        open_index(shards, RetrievalConfig(encoder=BM25, location=url))


def test_a_machine_without_room_is_told_with_its_place(tmp_path: Path) -> None:
    """The engine's error has the system's number in its text alone."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from dgpo_core.config.retrieval import EncoderConfig; "
        "from dgpo_core.datasets.records import Passage; "
        "from dgpo_core.retrieval.index import index_passages; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
        "index_passages([Passage('a', 'T', 'red house ' * 9000)], EncoderConfig(kind='bm25'))"
    )
    done = run_python(code, TMPDIR=str(tmp_path))
    assert f"ResourceError: cannot build the index in {tmp_path}, where " in done.stderr
    assert "MiB are free: file too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_old_server_is_refused(shards: Path, qdrant: QdrantServer) -> None:
    qdrant.version = "1.15.5"
    with pytest.raises(UserError, match=r"the Qdrant server is 1\.15\.5; 1\.19 or newer is needed"):
        open_index(shards, RetrievalConfig(encoder=BM25, location=qdrant.url))
    assert qdrant.engine.get_collections().collections == []


def test_a_new_collection_is_seen_only_when_it_was_accepted(
    shards: Path, qdrant: QdrantServer, queries: list[tuple[str, str]]
) -> None:
    """Blue/green: readers keep the old one until the new one is complete and good enough."""
    name = read_manifest(shards).collection
    old = RetrievalConfig(encoder=BM25, location=qdrant.url)
    reader = open_index(shards, old)
    before = reader.search([queries[0][0]], 3)
    target = loading.alias_target(qdrant.engine, name)
    new = old.model_copy(update={"qdrant": QdrantConfig(shards=2)})

    def refuse(searcher: module.Searcher) -> None:
        assert searcher.search([queries[0][0]], 3, exact=True), "it can be measured"
        assert loading.alias_target(qdrant.engine, name) == target
        raise UserError("not good enough")

    with pytest.raises(UserError, match="not good enough"):
        open_index(shards, new, accept=refuse)
    assert loading.alias_target(qdrant.engine, name) == target
    assert reader.search([queries[1][0]], 3)
    asked = len(qdrant.bodies("PUT /collections"))
    open_index(shards, new)
    assert len(qdrant.bodies("PUT /collections")) == asked, (
        "what was refused for its recall is not loaded anew"
    )
    assert loading.alias_target(qdrant.engine, name) == loading.collection_name(name, new.qdrant) != target
    assert reader.search([queries[0][0]], 3) == before


def test_a_served_index_has_no_vectors_for_another_location(tmp_path: Path, shards: Path) -> None:
    manifest = read_manifest(shards)
    write_manifest(tmp_path, replace(manifest, shards=[]))
    with pytest.raises(UserError, match=r"has no vectors.*make it again \(dvc repro --force index\)"):
        open_index(tmp_path, RetrievalConfig(encoder=BM25))


class Forgetful:
    """Ten points with scores 10 to 1, of which an inexact search forgets the best; none for a `none`."""

    def search(self, query: Query) -> list[list[Candidate]]:
        points = [Candidate(i, Passage(str(i), "T", "t"), 10.0 - i) for i in range(10)]
        return [points[0 if query.exact else 1 :][: query.limit] for _ in query.vectors]

    def close(self) -> None: ...


def test_the_share_of_the_exact_best() -> None:
    searcher = Searcher(Forgetful(), Bm25Encoder(5.0))
    assert search_recall(searcher, ["a", "b"], 3) == Recall(2 / 3, 2, 0)
    assert search_recall(searcher, ["a"], 1) == Recall(0.0, 1, 0)
    assert search_recall(searcher, [], 3) == Recall(None, 0, 0)


def test_an_exact_index_finds_everything(index: Index, queries: list[tuple[str, str]]) -> None:
    assert index.searcher
    asked = [query for query, _ in queries[:50]]
    assert search_recall(index.searcher, [*asked, "zzzzqqq"], 3) == Recall(1.0, 51, 1)


def test_too_little_is_refused_with_what_to_raise() -> None:
    config = RetrievalConfig(min_recall=0.9, qdrant=QdrantConfig(quantization="binary"))
    require_recall(Recall(0.9, 10, 9), config)
    with pytest.raises(UserError, match=r"recall@3 .* is 0\.8990, below 0\.9; raise .*hnsw_ef.*int8"):
        require_recall(Recall(0.899, 10, 0), config)


def test_a_recall_of_no_query_is_not_fine() -> None:
    """Where nothing is found, nothing is missed: that is no reason to go on."""
    with pytest.raises(UserError, match=r"10 of 10 validation questions find nothing.*a dense encoder"):
        require_recall(Recall(None, 10, 10), RetrievalConfig(min_recall=0.0))
