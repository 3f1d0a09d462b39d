"""Inverted lists against the definition: every passage scored by every term."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dgpo_core.retrieval import postings
from dgpo_core.retrieval.encoders import SparseVector
from dgpo_core.retrieval.postings import Postings, PostingsWriter
from dgpo_core.retrieval.ranking import Window


def zipf_vectors(count: int, terms: int = 60) -> list[SparseVector]:
    """Vectors of 0 to 12 terms, of which some are in nearly all of them and most in few."""
    rng = np.random.default_rng(count)
    vectors = []
    for _ in range(count):
        held = sorted({int(term) for term in rng.zipf(1.4, size=rng.integers(13)) if term <= terms})
        vectors.append(
            SparseVector([7 * term for term in held], rng.choice([0.5, 1.0, 1.7], len(held)).tolist())
        )
    return vectors


def every_score(vectors: list[SparseVector], query: SparseVector) -> dict[int, float]:
    """Score what shares a term as Qdrant defines BM25: the inner product, each term times its IDF."""
    containing = Counter(term for vector in vectors for term in vector.indices)
    scores = {}
    for number, vector in enumerate(vectors):
        weights = dict(zip(vector.indices, vector.values, strict=True))
        shared = [(t, v) for t, v in zip(query.indices, query.values, strict=True) if t in weights]
        idf = {
            t: math.log((len(vectors) - containing[t] + 0.5) / (containing[t] + 0.5) + 1) for t, _ in shared
        }
        if shared:
            scores[number] = math.fsum(v * float(np.float32(weights[t])) * idf[t] for t, v in shared)
    return scores


@pytest.mark.parametrize(("together", "sparse"), [(4096, 16), (1, 16), (1, 0), (40, 1)])
def test_the_best_passages_are_those_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, sparse: int
) -> None:
    """However many lists are read at once, and however scores are added up; with and without a window."""
    monkeypatch.setattr(postings, "AT_ONCE", together)
    monkeypatch.setattr(postings, "SPARSE", sparse)
    vectors, rng = zipf_vectors(400), np.random.default_rng(0)
    writer = PostingsWriter()
    for start in (0, 150):
        stop = 150 if start == 0 else 400
        writer.add([(number, vectors[number]) for number in range(start, stop)])
    writer.write(tmp_path / "lists", len(vectors))
    made = Postings(tmp_path / "lists", len(vectors))
    for _ in range(60):
        terms = sorted(rng.choice(np.arange(1, 70), size=rng.integers(1, 7), replace=False) * 7)
        query = SparseVector([int(term) for term in terms], rng.choice([1.0, 2.0], len(terms)).tolist())
        scores = every_score(vectors, query)
        limit, first = int(rng.integers(1, 30)), int(rng.integers(300))
        lowest = sorted(scores.values())[len(scores) // 2] if scores else 0.0
        for window in (None, Window(range(first, first + 90), lowest)):
            inside = {
                number: score
                for number, score in scores.items()
                if window is None or (number in window.numbers and score >= lowest)
            }
            found = made.search(query, limit, window)
            assert [score for _, score in found] == sorted(inside.values(), reverse=True)[:limit]
            assert all(inside[number] == score for number, score in found), "to the last bit"
            assert len({number for number, _ in found}) == len(found)


def test_what_no_passage_has_finds_nothing(tmp_path: Path) -> None:
    writer = PostingsWriter()
    writer.add([(0, SparseVector([], [])), (1, SparseVector([], []))])
    writer.write(tmp_path / "lists", 2)
    assert Postings(tmp_path / "lists", 2).search(SparseVector([3], [1.0]), 5) == []
