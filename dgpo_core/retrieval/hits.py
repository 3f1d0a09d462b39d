"""What a search returns, and who can be asked."""

from dataclasses import dataclass
from typing import Protocol

from dgpo_core.datasets.records import Passage


@dataclass(frozen=True)
class Hit:
    """A passage and its score: BM25, inner product or, of a fused ranking, the sum of reciprocal ranks.

    Of a service that gives no scores, the reciprocal rank.
    """

    passage: Passage
    score: float


class Retriever(Protocol):
    """`digest` identifies what is searched, so that an episode can name it."""

    digest: str

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Best passages of each query, best first. Raises InfrastructureError when the index fails."""
        ...
