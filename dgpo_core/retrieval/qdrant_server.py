"""A Qdrant server or cluster, or qdrant-client's memory: searches, builds and the care of collections.

A collection is created without a graph (HNSW off), filled in parallel, indexed at once, measured, and only
then given the alias by which readers know it: blue/green. A load that was killed goes on where it was.
Source: Qdrant's guides on bulk uploads, large collections and quantisation.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.errors import InfrastructureError, UserError, first_line, may_pass
from dgpo_core.files import parsed_json
from dgpo_core.retrieval.collection import Content, Part, Point, candidate, payload, point_bytes
from dgpo_core.retrieval.encoders import SparseVector, Vector
from dgpo_core.retrieval.ranking import Candidate, Query
from dgpo_core.retrieval.request_size import batches, vector_bytes

TIMEOUT = 60  # seconds for a request
EXACT_TIMEOUT = 600  # an exact search may have to read all original vectors from disk
MEMORY = ":memory:"
REFUSED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
)
REQUEST_BYTES = 16 * 2**20  # of what is sent at once; a server takes 32 MiB unless it is told otherwise
OLDEST_SERVER = (1, 19)  # the first with `memory`
ATTEMPTS = 8  # of one request: about a minute, in which a server restarts
LONGEST_WAIT = 30.0  # seconds between two of them
POLL = 0.5  # seconds between looks at the optimisers
CALM = 4  # looks in a row that must say green: between two jobs they are idle for a moment
PROBE = 10_000  # ids in one question for what is there
OURS = "dgpo"  # key of the metadata by which a collection is known as one of this pipeline

Progress = Callable[[int, int, str], None]  # done, total, what is done


def connect(url: str, config: QdrantConfig) -> QdrantClient:
    """Return a client of the server at `url`; its key is QDRANT_API_KEY of the environment, if it wants one.

    `https://` speaks TLS, gRPC too; certificates are checked (SSL_CERT_FILE names an authority of your own).
    """
    if url == MEMORY:
        return QdrantClient(MEMORY)
    return QdrantClient(
        url=url,
        api_key=os.environ.get("QDRANT_API_KEY"),
        timeout=TIMEOUT,
        prefer_grpc=config.grpc,
        grpc_port=config.grpc_port,
        https=url.startswith("https://"),
        pool_size=config.upload_parallel,
    )


class QdrantBackend:
    """A Backend; `collection` is a name, or an alias, which may come to mean another collection meanwhile."""

    def __init__(self, client: QdrantClient, collection: str, config: QdrantConfig) -> None:
        self._client, self._collection, self._config = client, collection, config

    def search(self, query: Query) -> list[list[Candidate]]:
        window = query.window
        within = models.Filter(must=[models.HasIdCondition(has_id=list(window.numbers))]) if window else None
        most, timeout = (1, EXACT_TIMEOUT) if query.exact else (len(query.vectors), None)
        found = []
        for batch in batches(query.vectors, most, REQUEST_BYTES, vector_bytes):
            requests = [
                models.QueryRequest(
                    query=to_qdrant(vector),
                    using=query.name,
                    limit=query.limit,
                    with_payload=True,
                    params=self._params(vector, query.exact),
                    filter=within,
                    score_threshold=window.score if window else None,
                )
                for vector in batch
            ]
            found += self._client.query_batch_points(self._collection, requests, timeout=timeout)
        return [[candidate(point) for point in response.points] for response in found]

    def _params(self, vector: Vector, exact: bool) -> models.SearchParams | None:
        if isinstance(vector, SparseVector):  # its inverted index is exact by itself
            return models.SearchParams(exact=True) if exact else None
        if exact:
            ignored = models.QuantizationSearchParams(ignore=True)
            return models.SearchParams(exact=True, quantization=ignored)
        quantised = models.QuantizationSearchParams(rescore=True, oversampling=self._config.oversampling)
        return models.SearchParams(
            hnsw_ef=self._config.hnsw_ef,
            quantization=None if self._config.quantization == "none" else quantised,
        )

    def close(self) -> None:
        self._client.close()


def refusal(error: Exception) -> str | None:
    """Return what a server says to a request that it will never take; None where trying again can help."""
    match error:
        case UnexpectedResponse():
            status = error.status_code or 0
            if status in (401, 403):
                return f"the server refuses the key of QDRANT_API_KEY (HTTP {status})"
            if 400 <= status < 500 and not may_pass(status):
                return f"the server refuses a request (HTTP {status}): {_said(error)}; is it a Qdrant server?"
        case json.JSONDecodeError():
            return "what it answers is not a Qdrant server's answer: no JSON"
        case ResponseHandlingException() if not isinstance(error.source, httpx.HTTPError | OSError):
            return f"what it answers is not a Qdrant server's answer: {first_line(error)}"
        case grpc.RpcError() if isinstance(error, grpc.Call):
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return f"the server refuses the key of QDRANT_API_KEY ({error.code().name})"
            if error.code() in REFUSED:
                return f"the server refuses a request ({error.code().name}): {error.details()}"
    return None


def _said(error: UnexpectedResponse) -> str:
    try:
        return str(parsed_json(error.content)["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return error.content[:200].decode("utf-8", "replace") or error.reason_phrase


def to_qdrant(vector: Vector) -> Any:
    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector


def collection_name(alias: str, config: QdrantConfig) -> str:
    """Return a collection's name: the alias, which names its content, and a digest of how it is built."""
    recipe = hashlib.sha256(json.dumps(config.built(), sort_keys=True).encode()).hexdigest()
    return f"{alias}-{recipe[:6]}"


def ensure(
    client: QdrantClient,
    content: Content,
    config: QdrantConfig,
    progress: Progress,
    accept: Callable[[str], None],
) -> None:
    """Ensure that readers of the alias `content.name` get a complete collection built with these settings.

    Where they do not yet, build one and give it to `accept`, which refuses it by raising; only then switch
    the alias. Raise InfrastructureError when points are missing or cannot be indexed.
    """
    name = collection_name(content.name, config)
    if alias_target(client, content.name) == name:
        return
    if not client.collection_exists(name):
        _require_version(client)
        create(client, name, content, config)
    upload(client, name, content, config, progress)
    client.update_collection(name, hnsw_config=models.HnswConfigDiff(m=config.hnsw_m))
    wait_until_green(client, name, progress)
    accept(name)
    switch(client, content.name, name)


def _require_version(client: QdrantClient) -> None:
    """Refuse an older server: it would ignore where vectors are to be kept, and take all of the memory."""
    version = client.info().version
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SERVER:
        oldest = ".".join(map(str, OLDEST_SERVER))
        raise UserError(f"retrieval.location: the Qdrant server is {version}; {oldest} or newer is needed")


def create(client: QdrantClient, name: str, content: Content, config: QdrantConfig) -> None:
    """Create an empty collection without a graph, which would be built again and again while points come."""
    client.create_collection(
        name,
        vectors_config={
            vector: models.VectorParams(
                size=size,
                distance=models.Distance.DOT,
                datatype=models.Datatype.FLOAT16,
                memory=models.Memory.COLD,
                quantization_config=_quantization(config),
            )
            for vector, size in content.vectors.items()
            if size is not None
        },
        sparse_vectors_config={
            vector: models.SparseVectorParams(modifier=models.Modifier.IDF)
            for vector, size in content.vectors.items()
            if size is None
        },
        shard_number=config.shards,
        replication_factor=config.replicas,
        hnsw_config=models.HnswConfigDiff(m=0, ef_construct=config.hnsw_ef_construct),
        metadata={OURS: {"digest": content.digest, "points": content.count, **config.built()}},
    )


def _quantization(config: QdrantConfig) -> Any:
    if config.quantization == "int8":
        return models.ScalarQuantization(
            scalar=models.ScalarQuantizationConfig(
                type=models.ScalarType.INT8, quantile=0.99, memory=models.Memory.PINNED
            )
        )
    if config.quantization == "binary":
        return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(memory=models.Memory.PINNED))
    return None


def upload(
    client: QdrantClient, name: str, content: Content, config: QdrantConfig, progress: Progress
) -> None:
    """Send the parts that the server does not have. Raise InfrastructureError if points are missing then."""
    present = _count(client, name)
    if present < content.count:
        missing = [part for part in content.parts if present == 0 or not _has(client, name, part)]
        stopped = threading.Event()
        done = content.count - sum(part.count for part in missing)
        progress(done, content.count, "uploading")
        with ThreadPoolExecutor(config.upload_parallel) as pool:
            sent = [pool.submit(_upload_part, client, name, p, config, stopped) for p in missing]
            try:
                for future in as_completed(sent):
                    done += future.result()
                    progress(done, content.count, "uploading")
            except BaseException:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        present = _count(client, name)
    if present != content.count:
        raise InfrastructureError(f"{name} has {present} points instead of {content.count} after the upload")


def _upload_part(
    client: QdrantClient, name: str, part: Part, config: QdrantConfig, stopped: threading.Event
) -> int:
    for chunk in batches(part.read(), config.upload_batch, REQUEST_BYTES, point_bytes):
        if stopped.is_set():
            break
        points = [_struct(point) for point in chunk]
        try:
            _persist(lambda points=points: client.upsert(name, points, wait=True))  # type: ignore[misc]
        except (UnexpectedResponse, grpc.RpcError) as error:
            reason = refusal(error)
            if reason is None:
                raise
            size = sum(map(point_bytes, chunk)) / 2**20
            raise UserError(
                f"retrieval.qdrant.upload_batch: {len(chunk)} passages from {chunk[0].passage.id!r} on, of "
                f"up to {size:.1f} MiB: {reason}; send fewer at once, or cut long passages"
            ) from error
    return part.count


def _struct(point: Point) -> models.PointStruct:
    vectors = {name: to_qdrant(vector) for name, vector in point.vectors.items()}
    return models.PointStruct(id=point.number, vector=vectors, payload=payload(point.passage))


def _count(client: QdrantClient, name: str) -> int:
    return client.count(name, exact=True).count


def _has(client: QdrantClient, name: str, part: Part) -> bool:
    """Ask the server whether it has every point of a part: it alone knows what it has kept."""
    end = part.first + part.count
    for start in range(part.first, end, PROBE):
        ids = list(range(start, min(start + PROBE, end)))
        condition: Any = models.HasIdCondition(has_id=ids)
        found = client.count(name, count_filter=models.Filter(must=[condition]), exact=True)
        if found.count < len(ids):
            return False
    return True


def wait_until_green(client: QdrantClient, name: str, progress: Progress) -> None:
    """Wait until the optimisers have nothing to do. Raise InfrastructureError when they have failed."""
    calm = 0
    while calm < CALM:
        info = _persist(lambda: client.get_collection(name))
        if info.status is models.CollectionStatus.RED:
            raise InfrastructureError(f"Qdrant cannot index {name}: {info.optimizer_status}")
        calm = calm + 1 if info.status is models.CollectionStatus.GREEN else 0
        progress(info.indexed_vectors_count or 0, info.points_count or 0, "indexing")
        if calm < CALM:
            time.sleep(POLL)


def alias_target(client: QdrantClient, alias: str) -> str | None:
    """Return the collection that readers of `alias` get, None where there is none."""
    found = [a.collection_name for a in client.get_aliases().aliases if a.alias_name == alias]
    return found[0] if found else None


def switch(client: QdrantClient, alias: str, name: str) -> None:
    """Give readers of `alias` the collection `name` from now on: at once, and never none."""
    operations: list[Any] = []
    if alias_target(client, alias) is not None:
        operations.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias)))
    created = models.CreateAlias(collection_name=name, alias_name=alias)
    client.update_collection_aliases([*operations, models.CreateAliasOperation(create_alias=created)])


def _persist(call: Callable[[], Any]) -> Any:
    """Make a call that may be repeated, again and again while the server or the way to it fails."""
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=0.5, max=LONGEST_WAIT),
        reraise=True,
    )
    return retrying(call)


def is_transient(error: BaseException) -> bool:
    """Return whether trying again can help: no connection, much load, a restart; not what is refused."""
    if isinstance(error, Exception) and refusal(error) is not None:
        return False
    match error:
        case ResponseHandlingException() | ResourceExhaustedResponse():
            return True
        case UnexpectedResponse():
            return error.status_code is not None and (error.status_code >= 500 or error.status_code == 429)
        case grpc.RpcError():
            codes = (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.ABORTED,
            )
            return isinstance(error, grpc.Call) and error.code() in codes
    return False


@dataclass(frozen=True)
class Collection:
    """A collection on a server; `alias` is None where its readers use another one of the same content."""

    name: str
    alias: str | None
    points: int
    status: str
    digest: str


def list_collections(client: QdrantClient) -> list[Collection]:
    """Return the collections that this pipeline has made, by name."""
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
    """Delete a collection. Raise UserError for one that readers use, and for one of another program."""
    found = {collection.name: collection for collection in list_collections(client)}
    if name not in found:
        raise UserError(f"{name}: no collection of this pipeline; there are {', '.join(found) or 'none'}")
    if alias := found[name].alias:
        raise UserError(
            f"{name}: readers use it, as {alias}; it is removable when another one has that alias"
        )
    client.delete_collection(name)


def snapshot_collection(client: QdrantClient, name: str) -> models.SnapshotDescription:
    """Make one file on the server with vectors, payloads and index; it takes as long as copying them."""
    snapshot = client.create_snapshot(name, wait=True)
    if snapshot is None:
        raise UserError(f"{name}: the server has made no snapshot; see its log")
    return snapshot


def restore_collection(client: QdrantClient, name: str, source: str) -> None:
    """Make collection `name` of a snapshot: a file:///... of the server, or a URL that it can fetch."""
    client.recover_snapshot(name, location=source, priority=models.SnapshotPriority.SNAPSHOT, wait=True)
