"""Where vectors are searched: Qdrant's engine in this process, or a collection that a client speaks to.

What is on a Qdrant server of ours: listed, removed, kept as snapshots and restored from them.

What goes into a collection: passages with their vectors, in parts that can be loaded one by one.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
from qdrant_client import QdrantClient, models

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Encoder, Vector
from dgpo_core.retrieval.ranking import Scored, Window, text_bytes, vector_bytes
from dgpo_core.retrieval.shards import Manifest, read_shard


class Backend(Protocol):
    """A filled collection."""

    def query(
        self,
        name: str,
        vectors: list[Vector],
        limit: int,
        exact: bool = False,
        window: Window | None = None,
    ) -> list[list[Scored]]:
        """Return the best points of each vector by the named vector, best first; of equal ones any.

        `exact` compares with every point's original vector instead of going through graph and quantisation.
        `window` leaves all other points out.
        """
        ...

    def close(self) -> None:
        """Release files and connections; nothing can be asked afterwards."""
        ...


def payload(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def scored(point: Any, score: float | None = None) -> Scored:
    """One of Qdrant's points, with its own score unless another is given."""
    return Scored(int(point.id), Passage(**point.payload), float(point.score) if score is None else score)


OURS = "dgpo"  # key of a collection's metadata


@dataclass(frozen=True)
class Collection:
    """`alias` is how readers know it, None when they use another one; `digest` names what is searched."""

    name: str
    alias: str | None
    points: int
    status: str
    digest: str


def describe_ours(digest: str, points: int, settings: dict[str, str | int]) -> dict[str, Any]:
    """The metadata by which a collection is known as ours."""
    return {OURS: {"digest": digest, "points": points, **settings}}


def list_collections(client: QdrantClient) -> list[Collection]:
    """Ours, by name; other programs' collections are left out."""
    aliases = {alias.collection_name: alias.alias_name for alias in client.get_aliases().aliases}
    found = []
    for name in sorted(collection.name for collection in client.get_collections().collections):
        info = client.get_collection(name)
        about = (info.config.metadata or {}).get(OURS)
        if about:
            points = info.points_count or 0
            found.append(Collection(name, aliases.get(name), points, str(info.status), about["digest"]))
    return found


def remove_collection(client: QdrantClient, name: str) -> None:
    """Raises UserError for one that readers use, or that is not ours."""
    found = {collection.name: collection for collection in list_collections(client)}
    if name not in found:
        raise UserError(f"{name}: no collection of this pipeline; there are {', '.join(found) or 'none'}")
    if alias := found[name].alias:
        raise UserError(
            f"{name}: readers use it, as {alias}; it is removable when another one has that alias"
        )
    client.delete_collection(name)


def snapshot_collection(client: QdrantClient, name: str) -> models.SnapshotDescription:
    """One file on the server with everything: vectors, payloads and index. Takes as long as copying it."""
    made = client.create_snapshot(name, wait=True)
    if made is None:
        raise UserError(f"{name}: the server has made no snapshot; see its log")
    return made


def restore_collection(client: QdrantClient, name: str, source: str) -> None:
    """Make collection `name` of a snapshot: file:///... as the server sees it, or a URL that it can fetch."""
    client.recover_snapshot(name, location=source, priority=models.SnapshotPriority.SNAPSHOT, wait=True)


ENCODED = "text"  # the named vector of the index's encoder
LEXICAL = "bm25"  # the second one of a hybrid index
CHUNK = 1000


@dataclass(frozen=True)
class Point:
    """`number` is the passage's place in the corpus; `vectors` by name."""

    number: int
    passage: Passage
    vectors: dict[str, Vector]


@dataclass(frozen=True)
class Part:
    """Points `first` to `first + count - 1`; `read` gives them in this order, each time anew."""

    first: int
    count: int
    read: Callable[[], Iterator[Point]]


@dataclass(frozen=True)
class Content:
    """A collection to be: its readers' name, the digest of what is searched, and the points.

    `vectors`: the dimension of each named vector, None for a sparse one.
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
    """The points of the shards in `folder`, a part for each shard; `lexical` makes the index a hybrid one."""
    parts, first = [], 0
    for shard in manifest.shards:
        count = pq.read_metadata(folder / shard).num_rows
        parts.append(Part(first, count, partial(_read, folder / shard, first, lexical)))
        first += count
    hybrid = lexical is not None
    digest = index_digest(manifest.digest, hybrid)
    return Content(content_name(manifest, hybrid), digest, first, _sizes(manifest.dense_size, lexical), parts)


def content_name(manifest: Manifest, hybrid: bool) -> str:
    """How readers know the collection; it says the kind and, by the digest, the content."""
    return f"dgpo-hybrid-{index_digest(manifest.digest, hybrid)[:12]}" if hybrid else manifest.collection


def encoded_content(passages: list[Passage], encoder: Encoder, lexical: Encoder | None = None) -> Content:
    """Passages that are in memory, encoded now."""
    vectors = encoder.encode_passages([passage.contents for passage in passages])
    rows = list(zip(passages, vectors, strict=True))
    part = Part(0, len(rows), lambda: _points(iter(rows), 0, lexical))
    return Content("memory", "memory", len(rows), _sizes(encoder.size, lexical), [part])


def index_digest(digest: str, hybrid: bool) -> str:
    """A hybrid index finds other passages than the encoder's vectors alone: it is another index."""
    fused = f"{digest}, bm25 with pairs of characters, fused"
    return hashlib.sha256(fused.encode()).hexdigest() if hybrid else digest


def point_bytes(point: Point) -> int:
    """Return how many bytes a point takes in a request, at most."""
    texts = (point.passage.id, point.passage.title, point.passage.text)
    return sum(map(text_bytes, texts)) + sum(map(vector_bytes, point.vectors.values()))


def _sizes(size: int | None, lexical: Encoder | None) -> dict[str, int | None]:
    return {ENCODED: size} if lexical is None else {ENCODED: size, LEXICAL: None}


def _read(path: Path, first: int, lexical: Encoder | None) -> Iterator[Point]:
    return _points(read_shard(path), first, lexical)


def _points(rows: Iterator[tuple[Passage, Vector]], first: int, lexical: Encoder | None) -> Iterator[Point]:
    numbers = itertools.count(first)
    while chunk := list(islice(rows, CHUNK)):
        texts = [passage.contents for passage, _ in chunk]
        others = lexical.encode_passages(texts) if lexical else [None] * len(chunk)
        for (passage, vector), other in zip(chunk, others, strict=True):
            vectors = {ENCODED: vector} if other is None else {ENCODED: vector, LEXICAL: other}
            yield Point(next(numbers), passage, vectors)
