"""Search in a Qdrant collection: in this process (Qdrant's embedded engine) or on a server."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import qdrant_edge as edge
from qdrant_client import QdrantClient, models

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError
from dgpo_core.retrieval.encoders import Encoder, SparseVector, Vector, make_encoder
from dgpo_core.retrieval.shards import Manifest, read_manifest, read_shard

VECTOR = "text"  # the one named vector of a collection
UPSERT = 1000
SPARE = 8  # hits fetched beyond those asked for, to see ties
TIE = 1e-5  # relative difference of scores that is rounding: Qdrant adds a score's terms in any order
Point = tuple[int, Passage, Vector]


@dataclass(frozen=True)
class Hit:
    passage: Passage
    score: float


class Retriever(Protocol):
    """`digest` identifies what is searched, so that an episode can name it."""

    digest: str

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Best passages of each query, best first. Raises InfrastructureError when the index fails."""
        ...


class Backend(Protocol):
    def fill(self, points: Iterator[Point], manifest: Manifest) -> None: ...

    def query(self, vectors: list[Vector], limit: int) -> list[list[Any]]:
        """Qdrant's scored points of each vector, best first; which of equal ones is left to Qdrant."""
        ...


class Index:
    """A Qdrant collection of encoded passages, filled where it is missing."""

    def __init__(self, manifest: Manifest, points: Iterator[Point], encoder: Encoder, location: str) -> None:
        self.digest = manifest.digest
        self._encoder = encoder
        self._cache: dict[tuple[str, int], list[Hit]] = {}
        try:
            self._backend: Backend = (
                EmbeddedBackend() if location == "embedded" else ServerBackend(connect(location))
            )
            self._backend.fill(points, manifest)
        except Exception as error:
            raise InfrastructureError(f"cannot fill the Qdrant collection at {location}: {error}") from error

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Best passages of each query, best first; the same query is asked only once."""
        new = list(dict.fromkeys(query for query in queries if (query, top_k) not in self._cache))
        if new:
            try:
                found = best_hits(self._backend, self._encoder.encode_queries(new), top_k)
            except Exception as error:
                raise InfrastructureError(f"the Qdrant index failed: {error}") from error
            self._cache.update(((query, top_k), hits) for query, hits in zip(new, found, strict=True))
        return [self._cache[query, top_k] for query in queries]


def best_hits(backend: Backend, vectors: list[Vector], top_k: int) -> list[list[Hit]]:
    """The best `top_k` hits of each vector; equal scores in the order of the corpus.

    Qdrant itself cuts ties differently in each build of the same collection, so more is fetched until the
    last place is no tie.
    """
    limit = top_k + SPARE
    results = backend.query(vectors, limit)
    for i, vector in enumerate(vectors):
        wider = limit
        while len(results[i]) == wider and _tied(results[i][top_k - 1], results[i][-1]):
            wider *= 4
            (results[i],) = backend.query([vector], wider)
    return [_hits(points)[:top_k] for points in results]


def open_index(folder: Path, location: str) -> Index:
    """The index that a folder of shards describes. Raises UserError for a folder without one."""
    manifest = read_manifest(folder)
    encoder = make_encoder(manifest.encoder_config, manifest.average_words)
    return Index(manifest, _points(folder, manifest), encoder, location)


def index_passages(passages: list[Passage], config: EncoderConfig) -> Index:
    """An embedded index of passages that are in memory, without shards on disk."""
    average_words = sum(len(passage.contents.split()) for passage in passages) / len(passages)
    encoder = make_encoder(config, average_words)
    manifest = Manifest(
        "memory", "memory", len(passages), average_words, encoder.size, config.model_dump(), []
    )
    vectors = encoder.encode_passages([passage.contents for passage in passages])
    points = ((i, p, v) for i, (p, v) in enumerate(zip(passages, vectors, strict=True)))
    return Index(manifest, points, encoder, "embedded")


def _points(folder: Path, manifest: Manifest) -> Iterator[Point]:
    number = 0
    for shard in manifest.shards:
        for passage, vector in read_shard(folder / shard):
            yield number, passage, vector
            number += 1


class EmbeddedBackend:
    """Qdrant's engine in this process, in a folder of its own: nothing is shared, nothing outlives it.

    Filling takes about 20 ms a thousand sparse vectors; for millions of passages use a server.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="dgpo-qdrant-")
        self._shard: Any = None

    def fill(self, points: Iterator[Point], manifest: Manifest) -> None:
        config = (
            edge.EdgeConfig(
                sparse_vectors={VECTOR: edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)},
                wal_enabled=False,
            )
            if manifest.dense_size is None
            else edge.EdgeConfig(
                vectors={VECTOR: edge.EdgeVectorParams(size=manifest.dense_size, distance=edge.Distance.Dot)},
                wal_enabled=False,
            )
        )
        self._shard = edge.EdgeShard.create(self._folder, config)
        while chunk := list(islice(points, UPSERT)):
            self._shard.update(
                edge.UpdateOperation.upsert_points(
                    [edge.Point(number, {VECTOR: _edge(v)}, _payload(p)) for number, p, v in chunk]
                )
            )
        self._shard.optimize()

    def query(self, vectors: list[Vector], limit: int) -> list[list[Any]]:
        return [
            self._shard.query(
                edge.QueryRequest(
                    limit=limit,
                    query=edge.Query.Nearest(_edge(vector), using=VECTOR),
                    with_payload=True,
                )
            )
            for vector in vectors
        ]

    def __del__(self) -> None:
        if self._shard is not None:
            self._shard.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def connect(url: str) -> QdrantClient:
    """A client of the server at `url`; its key, if it wants one, is QDRANT_API_KEY of the environment."""
    return QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"))


class ServerBackend:
    """A collection on a Qdrant server, or any other place that a QdrantClient speaks to."""

    def __init__(self, client: QdrantClient) -> None:
        self._client = client
        self._collection = ""

    def fill(self, points: Iterator[Point], manifest: Manifest) -> None:
        """Does nothing when the collection is already complete."""
        self._collection = manifest.collection
        client = self._client
        if client.collection_exists(self._collection):
            if client.count(self._collection, exact=True).count == manifest.passages:
                return
        elif manifest.dense_size is None:
            sparse = models.SparseVectorParams(modifier=models.Modifier.IDF)
            client.create_collection(
                self._collection, vectors_config={}, sparse_vectors_config={VECTOR: sparse}
            )
        else:
            dense = models.VectorParams(size=manifest.dense_size, distance=models.Distance.DOT)
            client.create_collection(self._collection, vectors_config={VECTOR: dense})
        while chunk := list(islice(points, UPSERT)):
            client.upsert(
                self._collection,
                [
                    models.PointStruct(id=number, vector={VECTOR: _remote(v)}, payload=_payload(p))
                    for number, p, v in chunk
                ],
            )

    def query(self, vectors: list[Vector], limit: int) -> list[list[Any]]:
        responses = self._client.query_batch_points(
            self._collection,
            [
                models.QueryRequest(query=_remote(vector), using=VECTOR, limit=limit, with_payload=True)
                for vector in vectors
            ],
        )
        return [response.points for response in responses]


def _payload(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def _hits(points: Any) -> list[Hit]:
    """Hits in the order of their scores; equal scores in the order of their ids."""
    groups: list[list[Any]] = []
    for point in sorted(points, key=lambda point: -point.score):
        if groups and _tied(groups[-1][-1], point):
            groups[-1].append(point)
        else:
            groups.append([point])
    ordered = [point for group in groups for point in sorted(group, key=lambda point: point.id)]
    return [Hit(Passage(**point.payload), round(float(point.score), 4)) for point in ordered]


def _tied(first: Any, second: Any) -> bool:
    return math.isclose(first.score, second.score, rel_tol=TIE)


def _edge(vector: Vector) -> Any:
    return edge.SparseVector(vector.indices, vector.values) if isinstance(vector, SparseVector) else vector


def _remote(vector: Vector) -> Any:
    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector
