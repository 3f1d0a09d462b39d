"""An index in this process, in a temporary folder or in one that stays.

Dense vectors are searched by Qdrant's engine (qdrant-edge-py), sparse ones by inverted lists (postings.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import finalize

import pyarrow as pa
import qdrant_edge as edge
from filelock import FileLock, Timeout

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError
from dgpo_core.files import replacement
from dgpo_core.retrieval.collection import Content, Point
from dgpo_core.retrieval.encoders import SparseVector
from dgpo_core.retrieval.postings import Postings, PostingsWriter
from dgpo_core.retrieval.ranking import Candidate, Query
from dgpo_core.temporary import temporary_folder

AT_ONCE = 1000  # points, and passages in a block of the file
ENGINE = "engine"  # of the dense vectors
PASSAGES = "passages.arrow"
FIELDS = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])


class EmbeddedBackend:
    """A Backend whose collection only this process sees.

    Without a `folder` it is filled anew by every process and removed at its end. In a folder it stays and is
    opened again; an unfinished one is made again. One process at a time can use a folder.
    Beyond about a million passages use a server.
    """

    def __init__(self, content: Content, folder: Path | None = None) -> None:
        held = ExitStack()
        self._release = finalize(self, held.close)  # at the latest when the process ends
        if folder is None:
            folder = held.enter_context(temporary_folder("index"))
        else:
            held.callback(_lock(folder / f"{content.name}.lock").release)
        target = folder / content.name
        if not (target / PASSAGES).is_file():
            _build(target, content)
        self._postings = {
            name: Postings(target / name, content.count)
            for name, size in content.vectors.items()
            if size is None
        }
        self._engine = edge.EdgeShard.load(str(target / ENGINE)) if (target / ENGINE).is_dir() else None
        file = pa.ipc.open_file(pa.memory_map(str(target / PASSAGES)))
        self._blocks = [file.get_batch(i).columns for i in range(file.num_record_batches)]

    def search(self, query: Query) -> list[list[Candidate]]:
        if not self._release.alive:
            raise RuntimeError("it is closed")
        found = self._sparse(query) if query.name in self._postings else self._dense(query)
        return [[Candidate(number, self._passage(number), score) for number, score in best] for best in found]

    def _passage(self, number: int) -> Passage:
        block, place = divmod(number, AT_ONCE)
        return Passage(*[column[place].as_py() for column in self._blocks[block]])

    def _sparse(self, query: Query) -> Iterator[list[tuple[int, float]]]:
        for vector in query.vectors:
            assert isinstance(vector, SparseVector)
            yield self._postings[query.name].search(vector, query.limit, query.window)

    def _dense(self, query: Query) -> Iterator[list[tuple[int, float]]]:
        assert self._engine
        window = query.window
        condition = edge.Filter(must=[edge.HasIdCondition(set(window.numbers))]) if window else None
        for vector in query.vectors:
            assert isinstance(vector, list)
            request = edge.QueryRequest(
                limit=query.limit,
                query=edge.Query.Nearest(vector, using=query.name),
                params=edge.SearchParams(exact=query.exact),
                filter=condition,
                score_threshold=window.score if window else None,
            )
            yield [(int(str(point.id)), point.score) for point in self._engine.query(request)]

    def close(self) -> None:
        if self._release.alive and self._engine:
            self._engine.close()
        self._release()


def _build(target: Path, content: Content) -> None:
    """Fill the folder `target`, which is there when it is complete."""
    with replacement(target) as unfinished:
        unfinished.mkdir()
        sparse = {name: PostingsWriter() for name, size in content.vectors.items() if size is None}
        engine = _new_engine(unfinished / ENGINE, content)
        with pa.ipc.new_file(str(unfinished / PASSAGES), FIELDS) as passages:
            points = content.points()
            while chunk := list(islice(points, AT_ONCE)):
                passages.write_batch(pa.RecordBatch.from_pylist([vars(p.passage) for p in chunk], FIELDS))
                for name, writer in sparse.items():
                    writer.add([(point.number, point.vectors[name]) for point in chunk])
                if engine:
                    engine.update(edge.UpdateOperation.upsert_points([_dense_point(p) for p in chunk]))
        for name, writer in sparse.items():
            writer.write(unfinished / name, content.count)
        if engine:
            engine.optimize()
            engine.flush()
            engine.close()


def _dense_point(point: Point) -> Any:
    vectors: dict[str, Any] = {n: v for n, v in point.vectors.items() if isinstance(v, list)}
    return edge.Point(point.number, vectors)


def _new_engine(folder: Path, content: Content) -> Any:
    """Make the engine of the dense vectors; None where there are none."""
    vectors = {
        name: edge.EdgeVectorParams(size=size, distance=edge.Distance.Dot)
        for name, size in content.vectors.items()
        if size is not None
    }
    return (
        edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors, wal_enabled=False)) if vectors else None
    )


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
