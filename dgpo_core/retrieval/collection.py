"""The content of a Qdrant collection: passages with their vectors, in parts that can be loaded one by one.

A `Backend` searches a filled collection: in this process (embedded.py) or on a server (qdrant_server.py).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Encoder, Vector
from dgpo_core.retrieval.ranking import Candidate, Query
from dgpo_core.retrieval.request_size import text_bytes, vector_bytes
from dgpo_core.retrieval.shards import Manifest, read_shard

ENCODED = "text"  # the named vector of the index's encoder
LEXICAL = "bm25"  # the second one of a hybrid index
PASSAGES_AT_ONCE = 1000  # that are in memory while a part is read


@dataclass(frozen=True)
class Point:
    """A point of Qdrant: `number` is the passage's position in the corpus, `vectors` have names."""

    number: int
    passage: Passage
    vectors: dict[str, Vector]


@dataclass(frozen=True)
class Part:
    """Points `first` to `first + count - 1`, which `read` yields in this order, each time anew."""

    first: int
    count: int
    read: Callable[[], Iterator[Point]]


@dataclass(frozen=True)
class Content:
    """The content of a collection: the name for its readers, the digest of what is searched, the points.

    `vectors` has the dimension of each named vector, None for a sparse one.
    """

    name: str
    digest: str
    count: int
    vectors: dict[str, int | None]
    parts: list[Part]

    def points(self) -> Iterator[Point]:
        for part in self.parts:
            yield from part.read()


def stored_content(folder: Path, manifest: Manifest, lexical: Encoder | None = None) -> Content:
    """Return the content of the shards in `folder`, a part for each; `lexical` makes the index hybrid."""
    parts, first = [], 0
    for shard in manifest.shards:
        count = pq.read_metadata(folder / shard).num_rows
        parts.append(Part(first, count, partial(_read, folder / shard, first, lexical)))
        first += count
    hybrid = lexical is not None
    digest = index_digest(manifest.digest, hybrid)
    return Content(content_name(manifest, hybrid), digest, first, _sizes(manifest.dense_size, lexical), parts)


def content_name(manifest: Manifest, hybrid: bool) -> str:
    """Return the name by which readers know the collection: its kind and, by the digest, its content."""
    return f"dgpo-hybrid-{index_digest(manifest.digest, hybrid)[:12]}" if hybrid else manifest.collection


def encoded_content(passages: list[Passage], encoder: Encoder, lexical: Encoder | None = None) -> Content:
    """Encode passages that are in memory, and return them as a content."""
    vectors = encoder.encode_passages([passage.contents for passage in passages])
    rows = list(zip(passages, vectors, strict=True))
    part = Part(0, len(rows), lambda: _points(iter(rows), 0, lexical))
    return Content("memory", "memory", len(rows), _sizes(encoder.size, lexical), [part])


def index_digest(digest: str, hybrid: bool) -> str:
    """Return the digest of an index; a hybrid one finds other passages, so it has another digest."""
    fused = f"{digest}, bm25 with pairs of characters, fused"
    return hashlib.sha256(fused.encode()).hexdigest() if hybrid else digest


def point_bytes(point: Point) -> int:
    """Return the most bytes that a point takes in a request."""
    texts = (point.passage.id, point.passage.title, point.passage.text)
    return sum(map(text_bytes, texts)) + sum(map(vector_bytes, point.vectors.values()))


def _sizes(size: int | None, lexical: Encoder | None) -> dict[str, int | None]:
    return {ENCODED: size} if lexical is None else {ENCODED: size, LEXICAL: None}


def _read(path: Path, first: int, lexical: Encoder | None) -> Iterator[Point]:
    return _points(read_shard(path), first, lexical)


def _points(rows: Iterator[tuple[Passage, Vector]], first: int, lexical: Encoder | None) -> Iterator[Point]:
    numbers = count(first)
    while chunk := list(islice(rows, PASSAGES_AT_ONCE)):
        texts = [passage.contents for passage, _ in chunk]
        others = lexical.encode_passages(texts) if lexical else [None] * len(chunk)
        for (passage, vector), other in zip(chunk, others, strict=True):
            vectors = {ENCODED: vector} if other is None else {ENCODED: vector, LEXICAL: other}
            yield Point(next(numbers), passage, vectors)


class Backend(Protocol):
    """A filled collection that can be searched."""

    def search(self, query: Query) -> list[list[Candidate]]:
        """Return the best candidates of each vector, best first; any of equal ones."""
        ...

    def close(self) -> None:
        """Release files and connections; nothing can be asked afterwards."""
        ...


def payload(passage: Passage) -> dict[str, str]:
    """Return what is stored beside a passage's vectors; `candidate` reads it back."""
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def candidate(point: Any) -> Candidate:
    """Return a point that Qdrant has found as a candidate."""
    return Candidate(int(point.id), Passage(**point.payload), float(point.score))
