"""Encoded passages on disk: Parquet shards and a manifest that names what they were made of."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Encoder, SparseVector, Tell, Vector, dense_column, make_encoder
from dgpo_core.retrieval.encoding import Job, encode_shards, visible_devices, write_shard
from dgpo_core.retrieval.flat_index import FlatIndex
from dgpo_core.retrieval.unspaced import spaced

MANIFEST = "manifest.json"
READ_AT_ONCE = 1000  # passages of a shard
SURVEY_REPORT = 20_000  # passages
SAME = 0.95  # cosine of an imported vector and our own of the same passage: rounding leaves above 0.99
Progress = Callable[[float, float, str], None]  # (done, total, unit)


@dataclass(frozen=True)
class Manifest:
    """What an index is: `digest` identifies passages and encoder, `collection` is its name in Qdrant."""

    collection: str
    digest: str
    passages: int
    average_words: float
    dense_size: int | None
    encoder: dict[str, str | int | None]
    shards: list[str]

    @property
    def encoder_config(self) -> EncoderConfig:
        return EncoderConfig.model_validate(self.encoder)


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError when `folder` holds no complete index."""
    path = folder / MANIFEST
    try:
        return Manifest(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the index stage first") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not an index manifest: {error}") from error


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
    by default every visible GPU or the CPU. Raises UserError for a corpus with mistakes, and for imported
    vectors that are not those of its passages.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, average_words, corpus_digest, unspaced = _survey(corpus, progress)
    make = partial(make_encoder, config.encoder, average_words, precision=config.precision)
    encoder = make_encoder(config.encoder, average_words)
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress(done, count, "passages")

    jobs = _missing(corpus, folder, config.shard_size, tell)
    if imported is not None:
        _check_shape(imported, count, encoder)
        _import_shards(jobs, imported, encoder, tell)
    elif encoder.size is None:
        encode_shards(jobs, lambda _: encoder, ["cpu"], tell)
    else:
        encode_shards(jobs, make, list(devices) or visible_devices(), tell)
    settings = config.encoder.model_dump()
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_shard(path: Path) -> Iterator[tuple[Passage, Vector]]:
    """Passages with their vectors, in the corpus's order; some at a time are in memory."""
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(READ_AT_ONCE):
            columns = (rows.column(name).to_pylist() for name in ("id", "title", "text"))
            for row in zip(*columns, _vectors(rows.column("vector")), strict=True):
                yield Passage(*row[:3]), row[3]


def _vectors(column: pa.Array) -> list[Vector]:
    if pa.types.is_struct(column.type):
        return [SparseVector(vector["indices"], vector["values"]) for vector in column.to_pylist()]
    numbers = column.flatten().to_numpy().astype(np.float32)
    return numbers.reshape(len(column), -1).tolist()  # type: ignore[no-any-return]


def _survey(corpus: Path, progress: Progress) -> tuple[int, float, str, bool]:
    """Number of passages, mean words a passage, SHA-256, whether any is in a script without spaces.

    Reads every line, so bad ones stop us early.
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


def _missing(corpus: Path, folder: Path, size: int, tell: Tell) -> Iterator[Job]:
    """The shards that are still to be written; `tell` is told of the others."""
    passages = read_corpus(corpus)
    for number in itertools.count():
        if not (chunk := list(itertools.islice(passages, size))):
            return
        path = folder / _name(number)
        if path.exists():
            tell(len(chunk))
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


def _import_shards(jobs: Iterator[Job], imported: FlatIndex, encoder: Encoder, tell: Tell) -> None:
    """Of each shard one passage is encoded, to see whether the vectors are those of these passages."""
    for job in jobs:
        vectors = imported.rows(job.first, job.first + len(job.passages))
        (own,) = encoder.encode_passages([job.passages[0].contents])
        if not (cosine := float(np.dot(vectors[0], own))) >= SAME:  # type: ignore[arg-type]  # nan too
            raise UserError(
                f"retrieval.vectors: vector {job.first} is not that of passage {job.passages[0].id!r} "
                f"(cosine {cosine:.3f}): another corpus, another order, another encoder, or other prefixes"
            )
        write_shard(job.path, job.passages, dense_column(vectors))
        tell(len(job.passages))
