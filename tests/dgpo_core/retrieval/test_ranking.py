"""Ties, and reciprocal rank fusion against qdrant-client's own."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qdrant_client.hybrid.fusion import reciprocal_rank_fusion
from qdrant_client.models import ScoredPoint

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, write_jsonl
from dgpo_core.retrieval.index import open_index, search_recall
from dgpo_core.retrieval.ranking import RRF_K, Candidate, Query, fuse, rank
from dgpo_core.retrieval.shards import build_shards
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer

PASSAGE = Passage("p", "T", "text")


def points(*scored: tuple[int, float]) -> list[Candidate]:
    return [Candidate(number, PASSAGE, score) for number, score in scored]


class Engine:
    """Knows the scores of all points, and cuts ties as it likes."""

    def __init__(self, scores: list[float], seed: int) -> None:
        self._points = points(*enumerate(scores))
        self._random = random.Random(seed)
        self.limits: list[int] = []
        self.fetched = 0

    def rank(self, top_k: int) -> list[int]:
        """The numbers of the best points."""
        (best,) = rank(self.search, Query("text", [[0.0]], top_k))
        return [point.number for point in best]

    def search(self, query: Query) -> list[list[Candidate]]:
        self.limits.append(query.limit)
        asked, window = self._points, query.window
        if window is not None:
            asked = [p for p in asked if p.number in window.numbers and p.score >= window.score]
        shuffled = self._random.sample(asked, len(asked))
        best = sorted(shuffled, key=lambda point: -point.score)[: query.limit]
        self.fetched += len(best) * len(query.vectors)
        return [best for _ in query.vectors]


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_cut_in_the_order_of_the_corpus(seed: int) -> None:
    engine = Engine([1.0] * 20 + [2.0] + [1.0 + 1e-7] * 40 + [0.5], seed)
    assert engine.rank(3) == [20, 0, 1]
    assert engine.limits == [11, 44, 176], "until the last place is no tie"
    engine = Engine([float(i) for i in range(30)], seed)
    assert engine.rank(2) == [29, 28]
    assert engine.limits == [10], "without ties once is enough"


@given(
    groups=st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 1.001, 3.0]), min_size=1, max_size=3),
    data=st.data(),
    top_k=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_ranks_are_those_of_the_whole_corpus(
    groups: list[float], data: st.DataObject, top_k: int, seed: int
) -> None:
    """Against sorting everything, with scores that tie but for rounding."""
    drawn = random.Random(seed)
    count = data.draw(st.integers(0, 1500))
    block = data.draw(st.integers(1, 400))  # equal ones stand together, or all over the corpus
    exact = [groups[(i // block) % len(groups)] for i in range(count)]
    engine = Engine([score * (1 + drawn.uniform(-3e-7, 3e-7)) for score in exact], seed)
    assert engine.rank(top_k) == sorted(range(count), key=lambda i: (-exact[i], i))[:top_k]


def test_what_many_ties_cost_does_not_grow_with_their_number() -> None:
    for copies in (1000, 50_000):
        engine = Engine([0.5] * 10 + [1.0] * copies + [2.0] * 2, 0)
        assert engine.rank(3) == [copies + 10, copies + 11, 10]
        assert engine.fetched < 500
        assert len(engine.limits) == 4


def test_many_ties_of_a_real_index(tmp_path: Path, qdrant: QdrantServer) -> None:
    """A thousand copies behind other passages, in every engine, also without an index's approximations."""
    texts = ["blue house", "red red house", *["red house"] * 700, "red red red house", *["red house"] * 300]
    write_jsonl(tmp_path / "corpus", [Passage(f"p{i}", "T", text) for i, text in enumerate(texts)])
    config = RetrievalConfig(encoder=EncoderConfig(kind="bm25"), shard_size=400)
    build_shards(tmp_path / "corpus", tmp_path / "index", config, lambda *_: None)
    for location in ("embedded", "memory", qdrant.url):
        opened = open_index(tmp_path / "index", config.model_copy(update={"location": location}))
        (hits,) = opened.search(["red"], 5)
        assert [hit.passage.id for hit in hits] == ["p702", "p1", "p2", "p3", "p4"], location
        assert opened.searcher
        assert search_recall(opened.searcher, ["red", "house"], 5).share == 1.0
        opened.close()


@pytest.mark.parametrize("seed", range(5))
def test_fusion_is_qdrants(seed: int) -> None:
    """Qdrant counts ranks from 0: its constant is one more for the same scores."""
    drawn = random.Random(seed)
    rankings = [points(*((n, 0.0) for n in drawn.sample(range(40), 25))) for _ in range(2)]
    theirs = reciprocal_rank_fusion(
        [[ScoredPoint(id=p.number, version=0, score=0.0) for p in ranking] for ranking in rankings],
        limit=40,
        ranking_constant_k=RRF_K + 1,
    )
    ours = fuse(rankings, 40)
    assert {p.number: p.score for p in ours} == pytest.approx({p.id: p.score for p in theirs})
    assert [p.score for p in ours] == sorted((p.score for p in ours), reverse=True)
    for first, second in pairwise(ours):
        assert first.score > second.score or first.number < second.number, "ties by number"
    assert fuse(rankings, 3) == ours[:3]
    assert fuse([[], []], 3) == []
