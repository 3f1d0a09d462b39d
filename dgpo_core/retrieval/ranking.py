"""Rankings that are the same whatever engine made them: ties, and the fusion of two rankings.

Qdrant ranks equal scores as it likes, differently in each build of the same collection, and its own fusion
(prefetch and RRF) inherits that: on the embedded world 15 % of the fused top 3 changed from one build to the
next. So ties are resolved here, and rankings are fused here, by the same formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Vector

SPARE = 8  # hits fetched beyond those asked for, to see ties
TIE = 1e-5  # relative difference of scores that is rounding: Qdrant adds a score's terms in any order
RRF_K = 60  # Cormack, Clarke and Büttcher (2009)
RRF_DEPTH = 50  # places of each ranking that count


@dataclass(frozen=True)
class Scored:
    """A point that was found; `number` is the passage's place in the corpus."""

    number: int
    passage: Passage
    score: float


Query = Callable[[list[Vector], int], list[list[Scored]]]


def rank(query: Query, vectors: list[Vector], top_k: int) -> list[list[Scored]]:
    """The best `top_k` of each vector, best first; equal scores in the order of the corpus.

    `query` gives some best points of each vector; more are asked for until the last place is no tie.
    """
    limit = top_k + SPARE
    results = query(vectors, limit)
    for i, vector in enumerate(vectors):
        wider = limit
        while len(results[i]) >= wider and _tied(results[i][top_k - 1], results[i][-1]):
            wider *= 4
            (results[i],) = query([vector], wider)
    return [_ordered(points)[:top_k] for points in results]


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


def _ordered(points: list[Scored]) -> list[Scored]:
    groups: list[list[Scored]] = []
    for point in sorted(points, key=lambda point: -point.score):
        if groups and _tied(groups[-1][-1], point):
            groups[-1].append(point)
        else:
            groups.append([point])
    return [point for group in groups for point in sorted(group, key=lambda point: point.number)]


def _tied(first: Scored, second: Scored) -> bool:
    return math.isclose(first.score, second.score, rel_tol=TIE)
