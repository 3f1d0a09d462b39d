"""Search in a collection on a Qdrant server or cluster, or in qdrant-client's memory; what it refuses."""

import json
import os
from typing import Any

import grpc
import httpx
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.errors import first_line
from dgpo_core.retrieval.backends import scored
from dgpo_core.retrieval.encoders import SparseVector, Vector
from dgpo_core.retrieval.ranking import Scored, Window
from dgpo_core.retrieval.requests import batches, vector_bytes

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


def connect(url: str, config: QdrantConfig) -> QdrantClient:
    """A client of the server at `url`; its key, if it wants one, is QDRANT_API_KEY of the environment.

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
    """`collection`: a name, or an alias, which may come to mean another collection meanwhile."""

    def __init__(self, client: QdrantClient, collection: str, config: QdrantConfig) -> None:
        self._client, self._collection, self._config = client, collection, config

    def query(
        self,
        name: str,
        vectors: list[Vector],
        limit: int,
        exact: bool = False,
        window: Window | None = None,
    ) -> list[list[Scored]]:
        within = models.Filter(must=[models.HasIdCondition(has_id=list(window.numbers))]) if window else None
        found = []
        for batch in batches(vectors, 1 if exact else len(vectors), REQUEST_BYTES, vector_bytes):
            requests = [
                models.QueryRequest(
                    query=to_qdrant(vector),
                    using=name,
                    limit=limit,
                    with_payload=True,
                    params=self._params(vector, exact),
                    filter=within,
                    score_threshold=window.score if window else None,
                )
                for vector in batch
            ]
            timeout = EXACT_TIMEOUT if exact else None
            found += self._client.query_batch_points(self._collection, requests, timeout=timeout)
        return [[scored(point) for point in response.points] for response in found]

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
            if 400 <= status < 500 and status not in (408, 425, 429):
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
        return str(json.loads(error.content)["status"]["error"])
    except (ValueError, KeyError, TypeError):
        return error.content[:200].decode("utf-8", "replace") or error.reason_phrase


def to_qdrant(vector: Vector) -> Any:
    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector
