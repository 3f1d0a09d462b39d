"""Search among sparse vectors by inverted lists: exact, and most lists are never read whole.

A term's list has the passages that hold it. MaxScore (Turtle and Flood, 1995): a query's lists are read from
the shortest on, until all others together cannot lift a passage that no list had so far among the best; in
the others, which are the long ones of frequent terms, only the passages found are looked up.
"""

import math
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dgpo_core.retrieval.encoders import SparseVector, Vector
from dgpo_core.retrieval.ranking import Window

Floats = NDArray[np.float64]
# What a folder has: the terms in order, with the IDF and the greatest weight of each; where the list of each
# begins, and the last one ends; the passages of all lists, in the order of the corpus, and the weights there.
ARRAYS = ("terms", "idf", "greatest", "starts", "numbers", "weights")
AT_ONCE = 4096  # entries of short lists that are read together
SPARSE = 16  # passages for one entry: beyond, not each passage gets a place for its score
ROUNDING = 1e-9  # relative: far above that of sums in float64


class PostingsWriter:
    """Collects the vectors of points, which come in the order of their numbers, and writes the lists."""

    def __init__(self) -> None:
        self._terms: list[NDArray[np.uint32]] = []
        self._numbers: list[NDArray[np.uint32]] = []
        self._weights: list[NDArray[np.float32]] = []

    def add(self, points: list[tuple[int, Vector]]) -> None:
        """Add some numbers with their vectors."""
        vectors = [vector for _, vector in points if isinstance(vector, SparseVector)]
        lengths = [len(vector.indices) for vector in vectors]
        numbers = np.array([number for number, _ in points], np.uint32)
        self._terms.append(np.fromiter(chain.from_iterable(v.indices for v in vectors), np.uint32))
        self._weights.append(np.fromiter(chain.from_iterable(v.values for v in vectors), np.float32))
        self._numbers.append(np.repeat(numbers, lengths))

    def write(self, folder: Path, count: int) -> None:
        """Write the lists of everything that was added, of `count` passages."""
        terms, numbers = np.concatenate(self._terms), np.concatenate(self._numbers)
        weights = np.concatenate(self._weights)
        order = np.argsort(terms, kind="stable")
        distinct, starts = np.unique(terms[order], return_index=True)
        weights = weights[order]
        greatest = np.maximum.reduceat(weights, starts) if len(starts) else weights
        starts = np.append(starts, len(order))
        lengths, which = np.unique(np.diff(starts), return_inverse=True)
        idf = np.array([_idf(count, length) for length in lengths.tolist()])[which]
        folder.mkdir()
        for name, array in zip(
            ARRAYS, (distinct, idf, greatest, starts, numbers[order], weights), strict=True
        ):
            np.save(folder / f"{name}.npy", array)


def _idf(passages: int, containing: int) -> float:
    """Return Qdrant's modifier `idf`: BM25's inverse document frequency, never negative."""
    return math.log((passages - containing + 0.5) / (containing + 0.5) + 1)


class _Lists(NamedTuple):
    """The lists of a query's terms, the shortest first: the query's value, the term's IDF, entries."""

    values: Floats
    idf: Floats
    numbers: list[NDArray[np.uint32]]
    weights: list[NDArray[np.float32]]

    def products(self, row: int, found: NDArray[np.uint32]) -> Floats:
        """Look up passages in a list, and return what it adds to their scores."""
        numbers = self.numbers[row]
        if not len(numbers):
            return np.zeros(len(found))
        places = numbers.searchsorted(found)
        held = numbers.take(places, mode="clip") == found
        weights = self.weights[row].take(places, mode="clip").astype(np.float64) * held
        products: Floats = self.values[row] * weights * self.idf[row]
        return products


class Postings:
    """The lists of `count` passages in a folder of PostingsWriter's; the files are memory-mapped."""

    def __init__(self, folder: Path, count: int) -> None:
        arrays = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS)
        self._terms, self._idf, self._greatest, self._starts, self._numbers, self._weights = arrays
        self._count = count

    def search(
        self, query: SparseVector, limit: int, window: Window | None = None
    ) -> list[tuple[int, float]]:
        """Return number and score of the best `limit` passages that share a term with the query, best first.

        The score is the inner product with Qdrant's IDF, exactly rounded: it depends on no order of terms.
        """
        if not len(self._terms):
            return []
        lists, most = self._lists(query, window)
        rest = np.append(np.cumsum(most[::-1])[::-1], 0.0)  # what the lists from here on can add
        lowest = window.score if window else 0.0  # no passage below is among the best
        found, scores, read = np.empty(0, np.uint32), np.empty(0), 0
        while read < len(most):
            if rest[read] < lowest:  # a passage that no list had so far is not among the best
                scores += lists.products(read, found)
                read += 1
            else:
                stop = _together(lists, read)
                found, scores = self._add(found, scores, lists, slice(read, stop))
                read = stop
            if len(found) > limit:
                lowest = max(lowest, float(np.partition(scores, -limit)[-limit]))
                near = scores >= lowest - rest[read] - ROUNDING * lowest
                found, scores = found[near], scores[near]
        best = _exact(found, lists, limit)
        return [(number, score) for number, score in best if window is None or score >= window.score]

    def _lists(self, query: SparseVector, window: Window | None) -> tuple[_Lists, Floats]:
        """Return the lists of the terms that there are, and what each can add to a score."""
        terms, values = np.array(query.indices, np.uint32), np.array(query.values, np.float64)
        rows = np.searchsorted(self._terms, terms)
        known = self._terms.take(rows, mode="clip") == terms
        rows, values = rows[known], values[known]
        starts, stops = self._starts[rows], self._starts[rows + 1]
        if window:
            ends = [window.numbers.start, window.numbers.stop]
            pairs = zip(starts, stops, strict=True)
            inside = [start + np.searchsorted(self._numbers[start:stop], ends) for start, stop in pairs]
            starts, stops = np.array(inside, np.intp).reshape(-1, 2).T
        order = np.argsort(stops - starts, kind="stable")
        rows, values = rows[order], values[order]
        places = [slice(start, stop) for start, stop in zip(starts[order], stops[order], strict=True)]
        idf = self._idf[rows]
        numbers, weights = (
            [self._numbers[place] for place in places],
            [self._weights[place] for place in places],
        )
        return _Lists(values, idf, numbers, weights), values * idf * self._greatest[rows]

    def _add(
        self, found: NDArray[np.uint32], scores: Floats, lists: _Lists, chosen: slice
    ) -> tuple[NDArray[np.uint32], Floats]:
        """Return the passages found, in order, and their scores, with those of some lists added."""
        factors = lists.values[chosen] * lists.idf[chosen]
        more = [f * w.astype(np.float64) for f, w in zip(factors, lists.weights[chosen], strict=True)]
        numbers, added = np.concatenate([found, *lists.numbers[chosen]]), np.concatenate([scores, *more])
        if SPARSE * len(numbers) < self._count:
            found, places = np.unique(numbers, return_inverse=True)
            return found, np.bincount(places, added).astype(np.float64)
        every = np.bincount(numbers, added).astype(np.float64)
        found = np.flatnonzero(every > 0).astype(np.uint32)
        return found, every[found]


def _together(lists: _Lists, first: int) -> int:
    """Return where the lists end that are read together with the one at `first`."""
    stop, entries = first + 1, len(lists.numbers[first])
    while stop < len(lists.numbers) and entries + len(lists.numbers[stop]) <= AT_ONCE:
        entries += len(lists.numbers[stop])
        stop += 1
    return stop


def _exact(found: NDArray[np.uint32], lists: _Lists, limit: int) -> list[tuple[int, float]]:
    """Score the passages `found` by all lists, and return the best `limit`, best first."""
    if not len(found):
        return []
    products = np.array([lists.products(row, found) for row in range(len(lists.numbers))])
    order = np.lexsort((found, -products.sum(axis=0)))[:limit]
    exact = zip(found[order].tolist(), map(math.fsum, products[:, order].T.tolist()), strict=True)
    return sorted(exact, key=lambda one: (-one[1], one[0]))
