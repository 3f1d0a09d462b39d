"""Recall against exact search, on a ranking that is known to miss some."""

import math

import pytest

from dgpo_core.config.retrieval import QdrantConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Bm25Encoder, Vector
from dgpo_core.retrieval.index import Index, Searcher
from dgpo_core.retrieval.ranking import Scored
from dgpo_core.retrieval.recall import require_recall, search_recall


class Forgetful:
    """Ten points with scores 10 to 1, of which an inexact search forgets the best; none for a `none`."""

    def query(self, name: str, vectors: list[Vector], limit: int, exact: bool = False) -> list[list[Scored]]:
        points = [Scored(i, Passage(str(i), "T", "t"), 10.0 - i) for i in range(10)]
        return [points[0 if exact else 1 :][:limit] for _ in vectors]

    def close(self) -> None: ...


def test_the_share_of_the_exact_best() -> None:
    searcher = Searcher(Forgetful(), Bm25Encoder(5.0))
    assert search_recall(searcher, ["a", "b"], 3) == pytest.approx(2 / 3)
    assert search_recall(searcher, ["a"], 1) == 0.0
    assert math.isnan(search_recall(searcher, [], 3))


def test_an_exact_index_finds_everything(index: Index, queries: list[tuple[str, str]]) -> None:
    assert index.searcher
    asked = [query for query, _ in queries[:50]]
    assert search_recall(index.searcher, [*asked, "zzzzqqq"], 3) == 1.0


def test_too_little_is_refused_with_what_to_raise() -> None:
    config = RetrievalConfig(min_recall=0.9, qdrant=QdrantConfig(quantization="binary"))
    require_recall(0.9, config)
    require_recall(math.nan, config)
    with pytest.raises(UserError, match=r"recall@3 .* is 0\.8990, below 0\.9; raise .*hnsw_ef.*int8"):
        require_recall(0.899, config)
