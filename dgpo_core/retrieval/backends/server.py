"""Search in a collection on a Qdrant server or cluster, or in qdrant-client's memory."""

import os
from typing import Any

from qdrant_client import QdrantClient, models

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.retrieval.backends import scored
from dgpo_core.retrieval.encoders import SparseVector, Vector
from dgpo_core.retrieval.ranking import Scored, Window

TIMEOUT = 60  # seconds for a request
EXACT_TIMEOUT = 600  # an exact search may have to read all original vectors from disk
MEMORY = ":memory:"


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
            for vector in vectors
        ]
        batches = [[request] for request in requests] if exact else [requests]
        timeout = EXACT_TIMEOUT if exact else None
        responses = [
            response
            for batch in batches
            if batch
            for response in self._client.query_batch_points(self._collection, batch, timeout=timeout)
        ]
        return [[scored(point) for point in response.points] for response in responses]

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


def to_qdrant(vector: Vector) -> Any:
    if isinstance(vector, SparseVector):
        return models.SparseVector(indices=vector.indices, values=vector.values)
    return vector
