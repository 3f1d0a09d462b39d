"""The index that agents search: one class, whatever `retrieval.location` names; and its recall.

Recall is how much of what an exact search finds the finished index finds too.
"""

import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qdrant_client import QdrantClient
from qdrant_client.http.exceptions import ResponseHandlingException

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig, cassette_file, parse_location
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, ResourceError, UserError
from dgpo_core.retrieval.cassette import Cassette, Source
from dgpo_core.retrieval.client import ServiceClient
from dgpo_core.retrieval.collection import (
    ENCODED,
    LEXICAL,
    Backend,
    encoded_content,
    index_digest,
    stored_content,
)
from dgpo_core.retrieval.embedded import EmbeddedBackend
from dgpo_core.retrieval.encoders import Bm25Encoder, Encoder
from dgpo_core.retrieval.qdrant_server import MEMORY, Progress, QdrantBackend, connect, ensure, refusal
from dgpo_core.retrieval.ranking import RRF_DEPTH, Candidate, Hit, Query, fuse, rank
from dgpo_core.retrieval.shards import make_encoder, read_manifest
from dgpo_core.text import spaced

CACHED_QUERIES = 100_000  # queries whose hits are kept
CACHED_TEXT = 200_000_000  # characters of their passages: 2,000 a query, with passages of 100 words
DIGITS = 4  # of a score


class Searcher:
    """Encodes queries and asks a backend; with `lexical` for two rankings, which it fuses."""

    def __init__(self, backend: Backend, encoder: Encoder, lexical: Encoder | None = None) -> None:
        self._backend = backend
        self._encoders = {ENCODED: encoder} if lexical is None else {ENCODED: encoder, LEXICAL: lexical}

    def search(self, queries: list[str], top_k: int, exact: bool = False) -> list[list[Candidate]]:
        """Return the best candidates of each query, best first; `exact`: without graph and quantisation."""
        if len(self._encoders) == 1:
            return self._rank(ENCODED, queries, top_k, exact)
        rankings = [self._rank(name, queries, max(RRF_DEPTH, top_k), exact) for name in self._encoders]
        return [fuse(list(both), top_k) for both in zip(*rankings, strict=True)]

    def _rank(self, name: str, queries: list[str], top_k: int, exact: bool) -> list[list[Candidate]]:
        vectors = self._encoders[name].encode_queries(queries)
        return rank(self._backend.search, Query(name, vectors, top_k, exact))

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        found = self.search(queries, top_k)
        return [[Hit(one.passage, round(one.score, DIGITS)) for one in candidates] for candidates in found]

    def close(self) -> None:
        self._backend.close()


class Index:
    """A Retriever that asks the same query only once, and whose failures are InfrastructureErrors.

    Several threads may search; one does at a time.
    """

    def __init__(self, digest: str, source: Source) -> None:
        self.digest = digest
        self._source = source
        self._cache: dict[tuple[str, int], list[Hit]] = {}  # the most recently used ones last
        self._text = 0  # characters in `_cache`
        self._lock = threading.Lock()

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return the best passages of each query, best first.

        Raise InfrastructureError when the search fails, and UserError when it is refused: the query, or the
        settings, are at fault.
        """
        with self._lock:
            return self._search(queries, top_k)

    def _search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        found = {query: self._forget((query, top_k)) for query in queries}
        new = [query for query, hits in found.items() if hits is None]
        try:
            if new:
                found |= zip(new, self._source.hits(new, top_k), strict=True)
        except (InfrastructureError, UserError):
            raise
        except UnicodeEncodeError as error:
            raise UserError(
                f"query {error.object[:100]!r}: not valid Unicode: half a surrogate pair"
            ) from error
        except Exception as error:
            if reason := refusal(error):
                raise UserError(f"retrieval.location: {reason}") from error
            raise InfrastructureError(f"the index failed: {error}") from error
        known = {query: hits for query, hits in found.items() if hits is not None}
        for query, hits in known.items():
            self._cache[query, top_k] = hits
            self._text += _length(hits)
        while len(self._cache) > CACHED_QUERIES or self._text > CACHED_TEXT:
            self._forget(next(iter(self._cache)))
        return [known[query] for query in queries]

    def _forget(self, key: tuple[str, int]) -> list[Hit] | None:
        """Return what is remembered, and keep it no longer; None where nothing is."""
        hits = self._cache.pop(key, None)
        self._text -= _length(hits or [])
        return hits

    @property
    def searcher(self) -> Searcher | None:
        """Return what can be compared with an exact search; None where a service searches, or a replay."""
        source = self._source.source if isinstance(self._source, Cassette) else self._source
        return source if isinstance(source, Searcher) else None

    def recorded(self, path: Path) -> "Index":
        """Return this index, whose finds are recorded from now on."""
        return Index(self.digest, Cassette(path, self.digest, self._source))

    def close(self) -> None:
        """Release files and connections; later searches fail."""
        self._source.close()


def _length(hits: list[Hit]) -> int:
    return sum(len(hit.passage.text) for hit in hits)


def open_index(
    folder: Path,
    config: RetrievalConfig,
    progress: Progress = lambda done, total, what: None,
    accept: Callable[[Searcher], None] = lambda searcher: None,
) -> Index:
    """Open the index that a folder of shards describes at `config.location`; make it there if it is missing.

    `accept` is given a server's new collection before readers see it, and refuses it by raising.
    Raises UserError for a folder without an index, InfrastructureError when the location fails.
    """
    index = _open(folder, config, progress, accept)
    file = cassette_file(config.location)
    return index.recorded(Path(file)) if file else index


def _open(
    folder: Path, config: RetrievalConfig, progress: Progress, accept: Callable[[Searcher], None]
) -> Index:
    manifest, location = read_manifest(folder), parse_location(config.location)
    digest = index_digest(manifest.digest, config.hybrid) if manifest.shards else manifest.digest
    if location.kind == "replay":
        return Index(digest, Cassette(Path(location.address), digest))
    if location.kind == "service":
        return Index(digest, ServiceClient(location.address, digest))
    if not manifest.shards:
        raise UserError(
            f"{folder}: has no vectors, because it was made of a retriever service's index; for "
            f"retrieval.location {config.location!r} make it again (dvc repro --force index)"
        )
    encoder = make_encoder(manifest.encoder_config, manifest.average_words)
    language = manifest.encoder_config.language
    lexical = Bm25Encoder(manifest.average_words, language) if config.hybrid else None
    content = stored_content(folder, manifest, lexical)
    shared = location.kind == "server"
    qdrant = config.qdrant if shared else config.qdrant.model_copy(update={"upload_parallel": 1})

    def collection(client: QdrantClient, name: str) -> Searcher:
        return Searcher(QdrantBackend(client, name, qdrant), encoder, lexical)

    def accept_in(client: QdrantClient, name: str) -> None:
        if shared:  # memory has no other readers
            accept(collection(client, name))

    try:
        if location.kind in ("embedded", "folder"):
            backend = EmbeddedBackend(content, Path(location.address) if location.address else None)
            return Index(content.digest, Searcher(backend, encoder, lexical))
        client = connect(location.address or MEMORY, qdrant)
        ensure(client, content, qdrant, progress, partial(accept_in, client))
        return Index(content.digest, collection(client, content.name))
    except (InfrastructureError, UserError):
        raise
    except Exception as error:
        raise _explained(config.location, error) from error


def index_passages(passages: list[Passage], config: EncoderConfig) -> Index:
    """Make an embedded index of passages that are in memory, without shards on disk."""
    average_words = sum(len(spaced(passage.contents).split()) for passage in passages) / len(passages)
    encoder = make_encoder(config, average_words)
    content = encoded_content(passages, encoder)
    try:
        return Index(content.digest, Searcher(EmbeddedBackend(content), encoder))
    except Exception as error:
        raise _explained("embedded", error) from error


def _explained(location: str, error: Exception) -> Exception:
    if reason := refusal(error):
        return UserError(f"retrieval.location: {location}: {reason}")
    if number := _system_error(error):
        place = Path(parse_location(location).address or tempfile.gettempdir())
        free = shutil.disk_usage(next(p for p in (place, *place.absolute().parents) if p.exists())).free
        return ResourceError(
            f"cannot build the index in {place}, where {free / 2**20:,.0f} MiB are free: "
            f"{os.strerror(number).lower()}: {error}; make room, raise the limit (ulimit -a), or name "
            "another place: TMPDIR, or a folder that stays (retrieval.location: embedded:<folder>)"
        )
    return InfrastructureError(f"cannot fill the Qdrant collection at {location}: {error}")


def _system_error(error: Exception) -> int | None:
    """Return the system's number of an error on disk; the embedded engine has it in its text alone."""
    if isinstance(error, ResponseHandlingException):  # of the way to a server
        return None
    found = re.search(r"os error (\d+)", str(error))
    return error.errno if isinstance(error, OSError) else int(found[1]) if found else None


@dataclass(frozen=True)
class Recall:
    """Recall against exact search: the mean `share` of the exact best passages that were found.

    `share` is None where no query finds any; `without_hits` of the `queries` find nothing, however searched.
    """

    share: float | None
    queries: int
    without_hits: int


def search_recall(searcher: Searcher, queries: list[str], top_k: int) -> Recall:
    """Measure recall@`top_k` over `queries`, without those that find nothing in an exact search."""
    found, exact = (searcher.search(queries, top_k, exact=exactly) for exactly in (False, True))
    shares = [
        len({p.number for p in first} & {p.number for p in best}) / len(best)
        for first, best in zip(found, exact, strict=True)
        if best
    ]
    share = sum(shares) / len(shares) if shares else None
    return Recall(share, len(queries), len(queries) - len(shares))


def require_recall(recall: Recall, config: RetrievalConfig) -> None:
    """Raise UserError when the measured recall is below `config.min_recall`, or of no query at all."""
    if recall.share is None:
        raise UserError(
            f"retrieval.encoder: {recall.without_hits} of {recall.queries} validation questions find nothing:"
            f" the corpus has none of their words. BM25 knows the forms of {config.encoder.language} words: "
            "set retrieval.encoder.language to that of the corpus, or take a dense encoder of that language "
            "(kind: dense); recall_queries: 0 does not ask"
        )
    if not recall.share >= config.min_recall:
        stronger = {"binary": ", or retrieval.qdrant.quantization: int8", "int8": ", or none", "none": ""}
        raise UserError(
            f"retrieval.min_recall: recall@{config.top_k} against exact search is {recall.share:.4f}, "
            f"below {config.min_recall}; raise retrieval.qdrant.hnsw_ef or .oversampling (searches take "
            "longer), then .hnsw_m and .hnsw_ef_construct (builds anew)"
            f"{stronger[config.qdrant.quantization]}"
        )
