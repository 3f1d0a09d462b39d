"""Ties, and reciprocal rank fusion against qdrant-client's own."""

import random
from itertools import pairwise

import pytest
from qdrant_client.hybrid.fusion import reciprocal_rank_fusion
from qdrant_client.models import ScoredPoint

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Vector
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.ranking import RRF_K, Scored, fuse, rank

PASSAGE = Passage("p", "T", "text")


def points(*scored: tuple[int, float]) -> list[Scored]:
    return [Scored(number, PASSAGE, score) for number, score in scored]


class Engine:
    """Knows the scores of all points, and cuts ties as it likes."""

    def __init__(self, scores: list[float], seed: int) -> None:
        self._points = points(*enumerate(scores))
        self._random = random.Random(seed)
        self.limits: list[int] = []

    def __call__(self, vectors: list[Vector], limit: int) -> list[list[Scored]]:
        self.limits.append(limit)
        shuffled = self._random.sample(self._points, len(self._points))
        best = sorted(shuffled, key=lambda point: -point.score)[:limit]
        return [best for _ in vectors]


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_cut_in_the_order_of_the_corpus(seed: int) -> None:
    engine = Engine([1.0] * 20 + [2.0] + [1.0 + 1e-7] * 40 + [0.5], seed)
    (best,) = rank(engine, [[0.0]], 3)
    assert [point.number for point in best] == [20, 0, 1]
    assert engine.limits == [11, 44, 176], "until the last place is no tie"


def test_without_ties_once_is_enough() -> None:
    engine = Engine([float(i) for i in range(30)], 0)
    (best,) = rank(engine, [[0.0]], 2)
    assert [point.number for point in best] == [29, 28]
    assert engine.limits == [10]


def test_ties_of_a_real_index() -> None:
    """Forty equal passages, more than are fetched at first, inserted among better and worse ones."""
    texts = (
        ["red house"] * 20
        + ["red red house"]
        + ["red house"] * 20
        + ["red and a very long text of a house"] * 3
    )
    part = [Passage(f"p{i}", "T", text) for i, text in enumerate(texts)]
    for _ in range(3):
        made = index_passages(part, EncoderConfig(kind="bm25"))
        (hits,) = made.search(["red"], 5)
        assert [hit.passage.id for hit in hits] == ["p20", "p0", "p1", "p2", "p3"]


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
