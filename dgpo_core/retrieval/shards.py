"""An index on disk: passages with their vectors in Parquet shards, and a manifest that says what they are of.

Vectors are encoded on every GPU, one process each, or in this process on the CPU; or they are taken from a
published flat faiss index, its file or the parts that it was split into.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.files import read_json, replacement
from dgpo_core.retrieval.encoders import (
    Bm25Encoder,
    Encoder,
    OnEncoded,
    SparseVector,
    Vector,
    dense_column,
)
from dgpo_core.tables import read_table
from dgpo_core.text import spaced

MANIFEST = "manifest.json"
READ_AT_ONCE = 1000  # passages of a shard
SURVEY_REPORT = 20_000  # passages
WAIT = 0.2  # seconds between two looks at the encoding processes
SAME = 0.95  # cosine of an imported vector and our own of the same passage: rounding leaves above 0.99
# Of a flat faiss index: type, dimension, vectors, two unused numbers, trained, metric, floats that follow.
HEADER = struct.Struct("<4siqqq?iQ")
FLAT = (b"IxFI", b"IxF2")  # by inner product, by L2 distance
Progress = Callable[[float, float, str], None]  # (done, total, unit)


def make_encoder(
    config: EncoderConfig, average_words: float, device: str = "cpu", precision: str = "float32"
) -> Encoder:
    """Make the encoder of `config`; `average_words` is the corpus's mean passage length, for BM25 alone."""
    if config.kind == "bm25":
        return Bm25Encoder(average_words, config.language)
    from dgpo_core.retrieval.dense_encoders import MeanPoolingEncoder, SentenceTransformersEncoder  # slow

    kind = MeanPoolingEncoder if config.kind == "dense" else SentenceTransformersEncoder
    return kind(config, device, precision)


@dataclass(frozen=True)
class Manifest:
    """Describes an index: `digest` identifies passages and encoder, `collection` is its name in Qdrant."""

    collection: str
    digest: str
    passages: int
    average_words: float
    dense_size: int | None
    encoder: dict[str, str | int | None]
    shards: list[str]

    def __post_init__(self) -> None:
        """Raise ValueError for an encoder that there is not."""
        EncoderConfig.model_validate(self.encoder)

    @property
    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig.model_validate(self.encoder)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an index. Raises UserError when `folder` holds no complete one."""
    path = folder / MANIFEST
    try:
        return read_json(path, Manifest, "an index manifest")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the index stage first") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def write_shard(path: Path, passages: list[Passage], vectors: pa.Array) -> None:
    """Write a shard, which appears complete or not at all."""
    table = pa.table(
        {
            "id": [passage.id for passage in passages],
            "title": [passage.title for passage in passages],
            "text": [passage.text for passage in passages],
            "vector": vectors,
        }
    )
    with replacement(path) as part:
        pq.write_table(table, part, compression="zstd")


def read_shard(path: Path) -> Iterator[tuple[Passage, Vector]]:
    """Yield passages with their vectors in the corpus's order, of which some at a time are in memory."""
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(READ_AT_ONCE):
            columns = (rows.column(name).to_pylist() for name in ("id", "title", "text"))
            for row in zip(*columns, _vectors(rows.column("vector")), strict=True):
                yield Passage(*row[:3]), row[3]


def read_passages(path: Path) -> list[Passage]:
    """Read the passages of a shard without their vectors."""
    table = read_table(path, ["id", "title", "text"])
    return [Passage(*row.values()) for row in table.to_pylist()]


def _vectors(column: pa.Array) -> list[Vector]:
    if pa.types.is_struct(column.type):
        return [SparseVector(vector["indices"], vector["values"]) for vector in column.to_pylist()]
    numbers = column.flatten().to_numpy().astype(np.float32)
    return numbers.reshape(len(column), -1).tolist()  # type: ignore[no-any-return]


class FlatIndex:
    """The vectors of a flat faiss index: `count` of `size` numbers; `digest` identifies the files' contents.

    The format is faiss's own (faiss/impl/index_write.cpp, IndexFlat): a header, then the vectors as float32,
    row by row. Reading it here needs neither faiss nor the parts put together, nor wiki-18's 64 GB in memory.
    Raises UserError for files that are not one whole flat index.
    """

    def __init__(self, parts: Sequence[Path], digest: str) -> None:
        self._parts, self.digest = list(parts), digest
        self._sizes = [part.stat().st_size for part in self._parts]
        name = ", ".join(map(str, self._parts))
        head = self._bytes(0, HEADER.size)
        if len(head) < HEADER.size or head[:4] not in FLAT:
            raise UserError(
                f"{name}: not a flat faiss index, or not its first part: it begins with {head[:4]!r}"
            )
        _, self.size, self.count, _, _, _, _, floats = HEADER.unpack(head)
        if floats != self.count * self.size or self.size <= 0:
            raise UserError(
                f"{name}: the header promises {self.count} vectors of {self.size} and {floats} numbers"
            )
        expected = HEADER.size + 4 * floats
        if sum(self._sizes) != expected:
            raise UserError(
                f"{name}: {sum(self._sizes):,} bytes, but {self.count:,} vectors of {self.size} take "
                f"{expected:,}; is a part missing, or not whole?"
            )

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Read [stop - start, size] from disk. Raises UserError for vectors that are not of length 1."""
        width = 4 * self.size
        data = self._bytes(HEADER.size + start * width, HEADER.size + stop * width)
        vectors = np.frombuffer(data, "<f4").reshape(stop - start, self.size)
        lengths = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))
        if len(wrong):
            raise UserError(
                f"{self._parts[0]}: vector {start + wrong[0]} has length {lengths[wrong[0]]:.3g}, not 1: "
                "it is not an index of normalised vectors, or its parts are in the wrong order"
            )
        return vectors

    def _bytes(self, start: int, stop: int) -> bytes:
        """Read bytes of the parts as if they were one file; fewer where it ends before."""
        pieces, offset = [], 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                with part.open("rb") as file:
                    file.seek(first)
                    pieces.append(file.read(last - first))
            offset += size
        return b"".join(pieces)


@dataclass(frozen=True)
class Job:
    """A shard to write; `first` is the position of its first passage in the corpus."""

    path: Path
    first: int
    passages: list[Passage]


def visible_devices() -> list[str]:
    """Return every GPU that this process sees (CUDA_VISIBLE_DEVICES chooses), or the CPU."""
    import torch  # slow, and BM25 does without

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def encode_shards(
    jobs: Iterator[Job], make: Callable[[str], Encoder], devices: list[str], on_encoded: OnEncoded
) -> None:
    """Write the shards of `jobs`, with an encoder made by `make(device)` for each of `devices`.

    What a shard holds does not depend on the number of devices. With several, `make` is pickled for their
    processes, and at most two jobs a device are in memory. Raises InfrastructureError when a process ends
    before its work.
    """
    if len(devices) == 1:
        encoder = make(devices[0])
        for job in jobs:
            _encode(job, encoder, on_encoded)
        return
    context = multiprocessing.get_context("spawn")
    tasks, reports = context.Queue(maxsize=len(devices)), context.Queue()
    workers = {
        device: context.Process(target=_work, args=(make, device, tasks, reports), daemon=True)
        for device in devices
    }
    try:
        for worker in workers.values():
            worker.start()
        for job_or_end in chain(jobs, repeat(None, len(devices))):
            _hand_over(job_or_end, tasks, lambda: _listen(workers, reports, on_encoded))
        for worker in workers.values():
            while worker.is_alive():
                worker.join(WAIT)
                _listen(workers, reports, on_encoded)
        _listen(workers, reports, on_encoded)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.join()


def _encode(job: Job, encoder: Encoder, on_encoded: OnEncoded) -> None:
    column = encoder.passage_column([passage.contents for passage in job.passages], on_encoded)
    write_shard(job.path, job.passages, column)


def _hand_over(job: Job | None, tasks: Any, listen: Callable[[], None]) -> None:
    while True:
        listen()
        try:
            tasks.put(job, timeout=WAIT)
            return
        except queue.Full:
            continue


def _listen(workers: dict[str, Any], reports: Any, on_encoded: OnEncoded) -> None:
    """Pass on what the workers report; raise what went wrong in them."""
    while True:
        try:
            report = reports.get_nowait()
        except queue.Empty:
            break
        if isinstance(report, UserError):
            raise report
        if isinstance(report, Exception):
            raise InfrastructureError(f"encoding failed: {report}") from report
        on_encoded(report)
    for device, worker in workers.items():
        if worker.exitcode:
            raise InfrastructureError(f"the process that encodes on {device} ended with {worker.exitcode}")


def _work(make: Callable[[str], Encoder], device: str, tasks: Any, reports: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        encoder = make(device)
        while (job := tasks.get()) is not None:
            _encode(job, encoder, reports.put)
    except Exception as error:
        reports.put(error)


def _end_with_parent() -> None:
    """End when the parent does: one that was killed ends nobody, and this process would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def build_shards(
    corpus: Path,
    folder: Path,
    config: RetrievalConfig,
    progress: Progress,
    *,
    imported: FlatIndex | None = None,
    devices: Sequence[str] = (),
) -> Manifest:
    """Encode a corpus into `folder`, or take its vectors from `imported`.

    Shards that are already there are kept: a killed run continues, with the same bytes. Encodes on `devices`,
    by default on every visible GPU or the CPU. Raises UserError for a corpus with mistakes, and for imported
    vectors that are not those of its passages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, average_words, corpus_digest, unspaced = _survey(corpus, progress)
    make = partial(make_encoder, config.encoder, average_words, precision=config.precision)
    encoder = make_encoder(config.encoder, average_words)
    done = 0

    def on_encoded(more: int) -> None:
        nonlocal done
        done += more
        progress(done, count, "passages")

    jobs = _missing(corpus, folder, config.shard_size, on_encoded)
    if imported is not None:
        _check_shape(imported, count, encoder)
        _import_shards(jobs, imported, encoder, on_encoded)
    elif encoder.size is None:
        encode_shards(jobs, lambda _: encoder, ["cpu"], on_encoded)
    else:
        encode_shards(jobs, make, list(devices) or visible_devices(), on_encoded)
    settings = config.encoder.recorded()
    identity: list[object] = [corpus_digest, settings, config.shard_size]
    if imported is not None:
        identity.append(imported.digest)
    elif encoder.size is not None:
        identity.append(config.precision)
    elif unspaced:
        identity.append("pairs of characters")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    manifest = Manifest(
        f"dgpo-{config.encoder.kind}-{digest[:12]}",
        digest,
        count,
        average_words,
        encoder.size,
        settings,
        [_name(number) for number in range(math.ceil(count / config.shard_size))],
    )
    write_manifest(folder, manifest)
    return manifest


def _survey(corpus: Path, progress: Progress) -> tuple[int, float, str, bool]:
    """Read every line, so that bad ones stop us early.

    Returns the number of passages, the mean words a passage, their SHA-256, and whether any is in a script
    without spaces.
    """
    count = words = size = 0
    unspaced = False
    digest = hashlib.sha256()
    total = corpus.stat().st_size / 1e6 if corpus.is_file() else 0.0
    for count, passage in enumerate(read_corpus(corpus), 1):
        separate = spaced(passage.contents)
        words += len(separate.split())
        unspaced = unspaced or separate != passage.contents
        line = f"{passage.id}\n{passage.contents}\n".encode()
        size += len(line)
        digest.update(line)
        if count % SURVEY_REPORT == 0:
            progress(size / 1e6, total, "MB checked")
    if count == 0:
        raise UserError(f"{corpus}: no passages in this file")
    return count, words / count, digest.hexdigest(), unspaced


def _missing(corpus: Path, folder: Path, size: int, on_encoded: OnEncoded) -> Iterator[Job]:
    """Yield the shards that are still to be written; `on_encoded` is told of the others."""
    passages = read_corpus(corpus)
    for number in itertools.count():
        if not (chunk := list(itertools.islice(passages, size))):
            return
        path = folder / _name(number)
        if path.exists():
            on_encoded(len(chunk))
        else:
            yield Job(path, number * size, chunk)


def _name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def _check_shape(imported: FlatIndex, count: int, encoder: Encoder) -> None:
    if imported.count != count:
        raise UserError(f"retrieval.vectors: {imported.count:,} vectors for {count:,} passages of the corpus")
    if imported.size != encoder.size:
        raise UserError(
            f"retrieval.vectors: vectors of {imported.size} numbers, but those of the encoder, which the "
            f"queries go through, have {encoder.size}"
        )


def _import_shards(jobs: Iterator[Job], imported: FlatIndex, encoder: Encoder, on_encoded: OnEncoded) -> None:
    """Write imported vectors; encode a passage of each shard, to see whether they are the passages' own."""
    for job in jobs:
        vectors = imported.rows(job.first, job.first + len(job.passages))
        (own,) = encoder.encode_passages([job.passages[0].contents])
        if not (cosine := float(np.dot(vectors[0], own))) >= SAME:  # type: ignore[arg-type]  # nan too
            raise UserError(
                f"retrieval.vectors: vector {job.first} is not that of passage {job.passages[0].id!r} "
                f"(cosine {cosine:.3f}): another corpus, another order, another encoder, or other prefixes"
            )
        write_shard(job.path, job.passages, dense_column(vectors))
        on_encoded(len(job.passages))
