"""Hits and candidates of a search, and rankings that are the same whatever engine searches.

Qdrant ranks equal scores as it likes, differently in each build of the same collection, and its own fusion
(prefetch and RRF) inherits that: on the embedded world 15 % of the fused top 3 changed from one build to the
next. So ties are resolved here, and rankings are fused here, by the same formula.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Vector


@dataclass(frozen=True)
class Hit:
    """A passage as agents get it, with its score.

    The score is BM25's, the inner product, or the sum of reciprocal ranks of a fused ranking; it is the
    reciprocal rank where a service gives no scores.
    """

    passage: Passage
    score: float


class Retriever(Protocol):
    """`digest` identifies what is searched, so that an episode can name it."""

    digest: str

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return the best passages of each query, best first. Raise InfrastructureError when that fails.

        Several threads may ask at a time.
        """
        ...


SPARE = 8  # candidates fetched beyond those asked for, to see ties
WIDEST = 100  # candidates; where more tie, only the first of them are looked for, passage by passage
FIRST_BLOCK, LARGEST_BLOCK = 100, 3200  # passages that are then looked at together
TIE = 1e-5  # relative difference of scores that is rounding: Qdrant adds a score's terms in any order
RRF_K = 60  # Cormack, Clarke and Büttcher (2009)
RRF_DEPTH = 50  # ranks of each ranking that count


@dataclass(frozen=True)
class Candidate:
    """A passage that a search has found; `number` is its position in the corpus, from 0."""

    number: int
    passage: Passage
    score: float


@dataclass(frozen=True)
class Window:
    """Limits of a search: passages with these numbers, and with at least this score."""

    numbers: range
    score: float


@dataclass(frozen=True)
class Query:
    """Asks for the best `limit` candidates of each of `vectors`, among the points' vectors called `name`.

    `exact` compares with every point's original vector instead of going through graph and quantisation.
    `window` leaves all other points out.
    """

    name: str
    vectors: list[Vector]
    limit: int
    exact: bool = False
    window: Window | None = None


Search = Callable[
    [Query], list[list[Candidate]]
]  # the candidates of each vector, best first; any of equal ones


def rank(search: Search, query: Query) -> list[list[Candidate]]:
    """Return what `query` asks for; equal scores in the order of the corpus.

    More are fetched until the last rank is no tie. Where very many tie, as copies of a passage do, only the
    first of the corpus are looked for: the price does not grow with their number.
    """
    top_k = query.limit
    results = search(replace(query, limit=top_k + SPARE))
    for i, vector in enumerate(query.vectors):
        alone = replace(query, vectors=[vector], limit=top_k + SPARE)
        while (cut := _cuts_a_tie(results[i], alone.limit, top_k)) and alone.limit < WIDEST:
            alone = replace(alone, limit=4 * alone.limit)
            (results[i],) = search(alone)
        if cut:
            results[i] = _with_first_ties(search, alone, results[i], top_k)
    return [_ordered(found)[:top_k] for found in results]


def _cuts_a_tie(found: list[Candidate], limit: int, top_k: int) -> bool:
    """Return whether candidates that tie with rank `top_k` may be missing from the `limit` best ones."""
    return len(found) >= limit and _tied(found[top_k - 1], found[-1])


def _with_first_ties(search: Search, query: Query, found: list[Candidate], top_k: int) -> list[Candidate]:
    """Return `found` and the first passages of the corpus that tie with rank `top_k`.

    `found` has all better ones, and some that tie: the first that tie do not come after those.
    """
    known = {candidate.number: candidate for candidate in found}
    lowest = found[top_k - 1].score - 2 * TIE * abs(found[top_k - 1].score)
    start, size = 0, FIRST_BLOCK
    while True:
        best = _ordered(known.values())[:top_k]
        end = 1 + max(candidate.number for candidate in best if _tied(candidate, best[-1]))
        if start >= end:
            return list(known.values())
        numbers = range(start, min(start + size, end))
        (block,) = search(replace(query, limit=len(numbers), window=Window(numbers, lowest)))
        known |= {candidate.number: candidate for candidate in block}
        start, size = numbers.stop, min(2 * size, LARGEST_BLOCK)


def fuse(rankings: list[list[Candidate]], top_k: int) -> list[Candidate]:
    """Fuse rankings by reciprocal ranks: a score is the sum of 1 / (RRF_K + rank), rank from 1."""
    scores: dict[int, float] = {}
    found: dict[int, Candidate] = {}
    for ranking in rankings:
        for position, candidate in enumerate(ranking, 1):
            found[candidate.number] = candidate
            scores[candidate.number] = scores.get(candidate.number, 0.0) + 1 / (RRF_K + position)
    best = sorted(scores, key=lambda number: (-scores[number], number))[:top_k]
    return [Candidate(number, found[number].passage, scores[number]) for number in best]


def _ordered(found: Iterable[Candidate]) -> list[Candidate]:
    groups: list[list[Candidate]] = []
    for candidate in sorted(found, key=lambda candidate: -candidate.score):
        if groups and _tied(groups[-1][-1], candidate):
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
    return [candidate for group in groups for candidate in sorted(group, key=lambda one: one.number)]


def _tied(first: Candidate, second: Candidate) -> bool:
    return math.isclose(first.score, second.score, rel_tol=TIE)
