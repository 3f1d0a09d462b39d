"""Qdrant's engine in this process (qdrant-edge-py), in a temporary folder or in one that stays."""

import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
import qdrant_edge as edge
from filelock import FileLock, Timeout

from dgpo_core.errors import InfrastructureError
from dgpo_core.files import replacement
from dgpo_core.retrieval.collection import Content, candidate, payload, point_bytes
from dgpo_core.retrieval.encoders import SparseVector, Vector
from dgpo_core.retrieval.ranking import Candidate, Query
from dgpo_core.retrieval.request_size import batches
from dgpo_core.temporary import temporary_folder

UPSERT = 1000
UPSERT_BYTES = 2**28
TERMS = "terms.npz"  # beside the engine's files: in how many points each term of a sparse vector occurs
ENGINE = "engine"


class EmbeddedBackend:
    """A Backend whose collection only this process sees.

    Without a `folder` it is filled anew by every process and removed at its end. In a folder it stays and is
    opened again; an unfinished one is made again. One process at a time can use a folder.
    Filling takes about 20 ms a thousand sparse vectors; beyond about a million passages use a server.
    """

    def __init__(self, content: Content, folder: Path | None = None) -> None:
        self._count = content.count
        held = ExitStack()
        self._release = finalize(self, held.close)  # at the latest when the process ends
        if folder is None:
            folder = held.enter_context(temporary_folder("qdrant"))
        else:
            held.callback(_lock(folder / f"{content.name}.lock").release)
        target = folder / content.name
        if not target.is_dir():
            _build(target, content)
        self._engine = edge.EdgeShard.load(str(target / ENGINE))
        with np.load(target / TERMS) as terms:
            self._terms = {name: dict(terms[name].tolist()) for name in terms.files}

    def search(self, query: Query) -> list[list[Candidate]]:
        name, window = query.name, query.window
        sparse = name in self._terms
        condition = edge.Filter(must=[edge.HasIdCondition(set(window.numbers))]) if window else None
        results = []
        for vector in query.vectors:
            found = self._engine.query(
                edge.QueryRequest(
                    limit=query.limit,
                    query=edge.Query.Nearest(_vector(vector), using=name),
                    with_payload=True,
                    with_vector=[name] if sparse else False,
                    params=edge.SearchParams(exact=query.exact),
                    filter=condition,
                    score_threshold=window.score if window else None,
                )
            )
            points = [candidate(p, self._score(name, vector, p) if sparse else None) for p in found]
            results.append(sorted(points, key=lambda point: -point.score))
        return results

    def _score(self, name: str, query: Vector, point: Any) -> float:
        """Compute the inner product with Qdrant's IDF, exactly rounded.

        The engine adds the terms in float32 and in an order that is drawn when a collection is built: its
        scores differ by 2e-7 of their value from one build to the next, enough to change the last digit kept.
        """
        assert isinstance(query, SparseVector)
        stored = point.vector[name]
        weights = dict(zip(stored.indices, stored.values, strict=True))
        frequency = self._terms[name]
        return math.fsum(
            value * weights[term] * _idf(self._count, frequency[term])
            for term, value in zip(query.indices, query.values, strict=True)
            if term in weights
        )

    def close(self) -> None:
        if self._release.alive:
            self._engine.close()
        self._release()


def _build(target: Path, content: Content) -> None:
    """Fill the folder `target`, which is there when it is complete."""
    config = edge.EdgeConfig(
        vectors={
            name: edge.EdgeVectorParams(size=size, distance=edge.Distance.Dot)
            for name, size in content.vectors.items()
            if size is not None
        },
        sparse_vectors={
            name: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)
            for name, size in content.vectors.items()
            if size is None
        },
        wal_enabled=False,
    )
    with replacement(target) as unfinished:
        unfinished.mkdir()
        engine = edge.EdgeShard.create(str(unfinished / ENGINE), config)
        terms: dict[str, Counter[int]] = {n: Counter() for n, size in content.vectors.items() if size is None}
        for chunk in batches(content.points(), UPSERT, UPSERT_BYTES, point_bytes):
            points = [
                edge.Point(p.number, {n: _vector(v) for n, v in p.vectors.items()}, payload(p.passage))
                for p in chunk
            ]
            engine.update(edge.UpdateOperation.upsert_points(points))
            for name, frequency in terms.items():
                for point in chunk:
                    vector = point.vectors[name]
                    assert isinstance(vector, SparseVector)
                    frequency.update(vector.indices)
        engine.optimize()
        engine.flush()
        engine.close()
        arrays = {n: np.array([*f.items()], np.int64).reshape(-1, 2) for n, f in terms.items()}
        np.savez(unfinished / TERMS, **arrays)  # type: ignore[arg-type]


def _idf(points: int, containing: int) -> float:
    """Return Qdrant's modifier `idf`: BM25's inverse document frequency, never negative."""
    return math.log((points - containing + 0.5) / (containing + 0.5) + 1)


def _lock(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InfrastructureError(
            f"{path.parent}: another process searches this index; one process at a time can. For several use "
            'retrieval.location "embedded", or a server'
        ) from None
    return lock


def _vector(vector: Vector) -> Any:
    return edge.SparseVector(vector.indices, vector.values) if isinstance(vector, SparseVector) else vector
