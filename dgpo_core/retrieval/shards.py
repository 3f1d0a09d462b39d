"""Encoded passages on disk: Parquet shards and a manifest that names what they were made of."""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Encoder, SparseVector, Vector, make_encoder

MANIFEST = "manifest.json"


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
    progress: Callable[[int, int], None],
) -> Manifest:
    """Encode a corpus into `folder`. Shards that are already there are kept: a killed run continues."""
    folder.mkdir(parents=True, exist_ok=True)
    count, average_words, corpus_digest = _survey(corpus)
    encoder = make_encoder(config.encoder, average_words)
    names = []
    for number, passages in enumerate(_chunks(read_corpus(corpus), config.shard_size)):
        names.append(f"shard-{number:05d}.parquet")
        path = folder / names[-1]
        if not path.exists():
            _write_shard(path, passages, encoder)
        progress(min((number + 1) * config.shard_size, count), count)
    settings = config.encoder.model_dump()
    key = json.dumps([corpus_digest, settings, config.shard_size], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()
    manifest = Manifest(
        f"dgpo-{config.encoder.kind}-{digest[:12]}",
        digest,
        count,
        average_words,
        encoder.size,
        settings,
        names,
    )
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")


def read_shard(path: Path) -> Iterator[tuple[Passage, Vector]]:
    for row in pq.read_table(path).to_pylist():
        vector = row["vector"]
        if isinstance(vector, dict):
            vector = SparseVector(vector["indices"], vector["values"])
        yield Passage(row["id"], row["title"], row["text"]), vector


def _survey(corpus: Path) -> tuple[int, float, str]:
    """Number of passages, mean words a passage, SHA-256; reads every line, so bad ones stop us early."""
    count = words = 0
    seen: set[str] = set()
    digest = hashlib.sha256()
    for passage in read_corpus(corpus):
        count += 1
        if passage.id in seen:
            raise UserError(f"{corpus}:{count}: id {passage.id!r} was used on an earlier line")
        seen.add(passage.id)
        words += len(passage.contents.split())
        digest.update(f"{passage.id}\n{passage.contents}\n".encode())
    if count == 0:
        raise UserError(f"{corpus}: no passages in this file")
    return count, words / count, digest.hexdigest()


def _chunks(passages: Iterator[Passage], size: int) -> Iterator[list[Passage]]:
    while chunk := list(itertools.islice(passages, size)):
        yield chunk


def _write_shard(path: Path, passages: list[Passage], encoder: Encoder) -> None:
    vectors = encoder.encode_passages([passage.contents for passage in passages])
    stored = [asdict(v) if isinstance(v, SparseVector) else v for v in vectors]
    table = pa.table(
        {
            "id": [passage.id for passage in passages],
            "title": [passage.title for passage in passages],
            "text": [passage.text for passage in passages],
            "vector": pa.array(stored, type=encoder.arrow_type),
        }
    )
    temporary = path.with_suffix(".part")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)
