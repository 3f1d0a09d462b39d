"""Recall against exact search, on a ranking that is known to miss some."""

import pytest

from dgpo_core.config.retrieval import QdrantConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Bm25Encoder, Vector
from dgpo_core.retrieval.index import Index, Recall, Searcher, require_recall, search_recall
from dgpo_core.retrieval.ranking import Candidate, Window


class Forgetful:
    """Ten points with scores 10 to 1, of which an inexact search forgets the best; none for a `none`."""

    def query(
        self, name: str, vectors: list[Vector], limit: int, exact: bool = False, window: Window | None = None
    ) -> list[list[Candidate]]:
        points = [Candidate(i, Passage(str(i), "T", "t"), 10.0 - i) for i in range(10)]
        return [points[0 if exact else 1 :][:limit] for _ in vectors]

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
