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

# What a folder has: the terms in order; where the list of each begins, and the last one ends; the passages of
# all lists, in the corpus's order in each, with the term's weight there; the greatest weight of each list.
ARRAYS = ("terms", "starts", "numbers", "weights", "greatest")
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

    def write(self, folder: Path) -> None:
        """Write the lists of everything that was added."""
        terms, numbers, weights = map(np.concatenate, (self._terms, self._numbers, self._weights))
        order = np.argsort(terms, kind="stable")
        terms, numbers, weights = terms[order], numbers[order], weights[order]
        distinct, starts = np.unique(terms, return_index=True)
        greatest = np.maximum.reduceat(weights, starts) if len(terms) else weights
        arrays = (distinct, np.append(starts, len(terms)), numbers, weights, greatest)
        folder.mkdir()
        for name, array in zip(ARRAYS, arrays, strict=True):
            np.save(folder / f"{name}.npy", array)


class _List(NamedTuple):
    """A term's list: passages in order, their weights; the query's `value`; the `most` that it adds."""

    numbers: NDArray[np.uint32]
    weights: NDArray[np.float32]
    value: float
    idf: float
    most: float

    def products(self, places: NDArray[np.intp] | slice) -> NDArray[np.float64]:
        products: NDArray[np.float64] = self.value * self.weights[places].astype(np.float64) * self.idf
        return products


class Postings:
    """The lists of `count` passages in a folder of PostingsWriter's; the files are memory-mapped."""

    def __init__(self, folder: Path, count: int) -> None:
        arrays = (np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS)
        self._terms, self._starts, self._numbers, self._weights, self._greatest = arrays
        self._count = count

    def search(
        self, query: SparseVector, limit: int, window: Window | None = None
    ) -> list[tuple[int, float]]:
        """Return number and score of the best `limit` passages that share a term with the query, best first.

        The score is the inner product with Qdrant's IDF, exactly rounded: it depends on no order of terms.
        """
        lists = sorted(self._lists(query, window), key=lambda one: len(one.numbers))
        rest = sum(one.most for one in lists)  # what the lists that are not read yet can add
        lowest = window.score if window else 0.0  # no passage below is among the best
        found, scores = np.empty(0, np.uint32), np.zeros(self._count)
        for one in lists:
            if rest < lowest:
                break
            found = np.concatenate([found, one.numbers[scores[one.numbers] == 0]])
            scores[one.numbers] += one.products(slice(None))
            rest -= one.most
            if len(found) >= limit:
                lowest = max(lowest, float(np.partition(scores[found], -limit)[-limit]))
        found = found[scores[found] >= lowest - rest - ROUNDING * lowest]
        best = _exact(found, lists, limit)
        return [(number, score) for number, score in best if window is None or score >= window.score]

    def _lists(self, query: SparseVector, window: Window | None) -> list[_List]:
        terms = np.array(query.indices, np.uint32)
        lists = []
        for row, term, value in zip(np.searchsorted(self._terms, terms), terms, query.values, strict=True):
            if row == len(self._terms) or self._terms[row] != term:
                continue
            start, stop = self._starts[row], self._starts[row + 1]
            idf = _idf(self._count, int(stop - start))
            if window:
                inside = np.searchsorted(
                    self._numbers[start:stop], [window.numbers.start, window.numbers.stop]
                )
                start, stop = start + inside
            numbers, weights = self._numbers[start:stop], self._weights[start:stop]
            lists.append(_List(numbers, weights, value, idf, value * float(self._greatest[row]) * idf))
        return lists


def _exact(found: NDArray[np.uint32], lists: list[_List], limit: int) -> list[tuple[int, float]]:
    """Score the passages `found` by all lists, and return the best `limit`, best first."""
    products = np.zeros((len(lists), len(found)))
    for row, one in zip(products, lists, strict=True):
        places = np.searchsorted(one.numbers, found)
        places[places == len(one.numbers)] = 0
        held = np.flatnonzero(one.numbers[places] == found) if len(one.numbers) else []
        row[held] = one.products(places[held])
    order = np.lexsort((found, -products.sum(axis=0)))[:limit]
    exact = zip(found[order].tolist(), map(math.fsum, products[:, order].T.tolist()), strict=True)
    return sorted(exact, key=lambda one: (-one[1], one[0]))


def _idf(points: int, containing: int) -> float:
    """Return Qdrant's modifier `idf`: BM25's inverse document frequency, never negative."""
    return math.log((points - containing + 0.5) / (containing + 0.5) + 1)
