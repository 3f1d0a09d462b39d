"""What a search returns, and who can be asked.

Rankings that are the same whatever engine made them: ties, and the fusion of two rankings.

Qdrant ranks equal scores as it likes, differently in each build of the same collection, and its own fusion
(prefetch and RRF) inherits that: on the embedded world 15 % of the fused top 3 changed from one build to the
next. So ties are resolved here, and rankings are fused here, by the same formula.

Requests of a size that servers take: cut by the number of their parts, and by their bytes.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import SparseVector, Vector


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


SPARE = 8  # hits fetched beyond those asked for, to see ties
WIDEST = 100  # hits; beyond that many ties only the first of them are looked for, passage by passage
FIRST_BLOCK, LARGEST_BLOCK = 100, 3200  # passages that are looked at together then
TIE = 1e-5  # relative difference of scores that is rounding: Qdrant adds a score's terms in any order
RRF_K = 60  # Cormack, Clarke and Büttcher (2009)
RRF_DEPTH = 50  # places of each ranking that count


@dataclass(frozen=True)
class Scored:
    """A point that was found; `number` is the passage's place in the corpus."""

    number: int
    passage: Passage
    score: float


@dataclass(frozen=True)
class Window:
    """Which points a search is about: those with these numbers, and with this score at least."""

    numbers: range
    score: float


class Query(Protocol):
    def __call__(
        self, vectors: list[Vector], limit: int, /, window: Window | None = None
    ) -> list[list[Scored]]:
        """Return the best points of each vector, best first; of equal ones any."""
        ...


def rank(query: Query, vectors: list[Vector], top_k: int) -> list[list[Scored]]:
    """Return the best `top_k` of each vector, best first; equal scores in the order of the corpus.

    More are asked for until the last place is no tie. Where a great many tie, as copies of one passage do,
    only the first are looked for: the price does not grow with their number.
    """
    limit = top_k + SPARE
    results = query(vectors, limit)
    for i, vector in enumerate(vectors):
        wider = limit
        while (cut := _cuts_a_tie(results[i], wider, top_k)) and wider < WIDEST:
            wider *= 4
            (results[i],) = query([vector], wider)
        if cut:
            results[i] = _with_first_ties(query, vector, results[i], top_k)
    return [_ordered(points)[:top_k] for points in results]


def _cuts_a_tie(points: list[Scored], limit: int, top_k: int) -> bool:
    """Whether points that tie with place `top_k` may be missing from the `limit` best ones."""
    return len(points) >= limit and _tied(points[top_k - 1], points[-1])


def _with_first_ties(query: Query, vector: Vector, points: list[Scored], top_k: int) -> list[Scored]:
    """Return `points` and the first ones of the corpus that tie with place `top_k`.

    `points` has all better ones, and some that tie: the first that tie are not behind those.
    """
    known = {point.number: point for point in points}
    lowest = points[top_k - 1].score - 2 * TIE * abs(points[top_k - 1].score)
    start, size = 0, FIRST_BLOCK
    while True:
        best = _ordered(known.values())[:top_k]
        end = 1 + max(point.number for point in best if _tied(point, best[-1]))
        if start >= end:
            return list(known.values())
        numbers = range(start, min(start + size, end))
        (found,) = query([vector], len(numbers), window=Window(numbers, lowest))
        known |= {point.number: point for point in found}
        start, size = numbers.stop, min(2 * size, LARGEST_BLOCK)


def fuse(rankings: list[list[Scored]], top_k: int) -> list[Scored]:
    """Reciprocal rank fusion: the score is the sum of 1 / (RRF_K + rank) over the rankings, rank from 1."""
    scores: dict[int, float] = {}
    points: dict[int, Scored] = {}
    for ranking in rankings:
        for place, point in enumerate(ranking, 1):
            points[point.number] = point
            scores[point.number] = scores.get(point.number, 0.0) + 1 / (RRF_K + place)
    best = sorted(scores, key=lambda number: (-scores[number], number))[:top_k]
    return [Scored(number, points[number].passage, scores[number]) for number in best]


def _ordered(points: Iterable[Scored]) -> list[Scored]:
    groups: list[list[Scored]] = []
    for point in sorted(points, key=lambda point: -point.score):
        if groups and _tied(groups[-1][-1], point):
            groups[-1].append(point)
        else:
            groups.append([point])
    return [point for group in groups for point in sorted(group, key=lambda point: point.number)]


def _tied(first: Scored, second: Scored) -> bool:
    return math.isclose(first.score, second.score, rel_tol=TIE)


T = TypeVar("T")
JSON_CHARACTER = 6  # bytes at most: a control character is \\u0001
JSON_NUMBER = 26  # bytes at most, with its comma: -1.2345678901234567e-300


def batches(items: Iterable[T], most: int, most_bytes: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut into lists of at most `most` items and `most_bytes` bytes; an item that is larger is alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        own = size(item)
        if batch and (len(batch) == most or total + own > most_bytes):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += own
    if batch:
        yield batch


def text_bytes(text: str) -> int:
    """Return how many bytes a text takes in a request, at most."""
    return JSON_CHARACTER * len(text)


def vector_bytes(vector: Vector) -> int:
    """Return how many bytes a vector takes in a request, at most."""
    numbers = 2 * len(vector.indices) if isinstance(vector, SparseVector) else len(vector)
    return JSON_NUMBER * numbers
