"""A retriever service as the index: the field's POST /retrieve (Search-R1's server; docs/operations.md).

What the service does not say is never made up: no answer, a broken one or one of another index is an
InfrastructureError, never an empty result.
"""

from typing import Any, NamedTuple

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval.hits import Hit

INDEX_HEADER = "X-Index-Digest"
TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # seconds; a batch of queries may have to be encoded on a CPU
ATTEMPTS = 3  # of one request
LONGEST_WAIT = 5.0  # seconds between two of them
BATCH = 256  # queries in one request
OVERLOADED = (429, 502, 503, 504)


class ServedIndex(NamedTuple):
    """What a service says of its index; `passages` is 0 where it does not say."""

    digest: str
    passages: int


class ServiceClient:
    """`digest`: the index that the service must have; every answer is compared with it."""

    def __init__(self, url: str, digest: str) -> None:
        self._url, self._digest = url, digest
        self._client = httpx.Client(timeout=TIMEOUT)
        self._check(describe_service(url).digest)

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Passages and scores of each query, best first, as the service has them.

        Raises InfrastructureError when there is no answer, or none that can be trusted; UserError with the
        service's reason when it refuses the request.
        """
        found: list[list[Hit]] = []
        for start in range(0, len(queries), BATCH):
            part = queries[start : start + BATCH]
            body = {"queries": part, "topk": top_k, "return_scores": True}
            response = _request(self._client, "POST", f"{self._url}/retrieve", json=body)
            if response.is_client_error:
                raise UserError(f"{self._url}/retrieve refuses the request: {_reason(response)}")
            self._check(response.headers.get(INDEX_HEADER) or _unverified(self._url))
            found += self._parsed(response, len(part), top_k)
        return found

    def _check(self, digest: str) -> None:
        if digest != self._digest:
            raise InfrastructureError(
                f"{self._url} serves the index {digest!r}, not {self._digest!r}, which data/index names; "
                "serve that one, or make data/index again from this one (dvc repro --force index)"
            )

    def _parsed(self, response: httpx.Response, queries: int, top_k: int) -> list[list[Hit]]:
        try:
            results = response.json()["result"]
            if len(results) != queries:
                raise ValueError(f"{len(results)} results for {queries} queries")
            if any(len(result) > top_k for result in results):
                raise ValueError(f"more than {top_k} passages for a query")
            return [[_hit(item) for item in result] for result in results]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InfrastructureError(
                f"{self._url}/retrieve does not answer as a retriever does (docs/operations.md): {error!r}"
            ) from error

    def close(self) -> None:
        self._client.close()


def describe_service(url: str) -> ServedIndex:
    """Which index a service has. One of others does not say; its index is then known by its address alone.

    Raises InfrastructureError when there is no service, or one that is not ready.
    """
    with httpx.Client(timeout=TIMEOUT) as client:
        response = _request(client, "GET", f"{url}/health")
    try:
        said = response.json()
        return ServedIndex(str(said["index"]), int(said["passages"]))
    except (ValueError, KeyError, TypeError):
        return ServedIndex(_unverified(url), 0)


def _unverified(url: str) -> str:
    return f"unverified: {url}"


def _hit(item: dict[str, Any]) -> Hit:
    return Hit(Passage.from_json(item["document"]), float(item["score"]))


def _request(client: httpx.Client, method: str, url: str, **content: Any) -> httpx.Response:
    """Tried again while nobody answers or the service is overloaded; errors of the service are raised."""
    retrying = Retrying(
        retry=retry_if_exception_type(InfrastructureError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=0.2, max=LONGEST_WAIT),
        reraise=True,
    )

    def once() -> httpx.Response:
        try:
            response = client.request(method, url, **content)
        except httpx.HTTPError as error:
            raise InfrastructureError(f"no answer from {url}: {error or type(error).__name__}") from error
        if response.is_server_error or response.status_code in OVERLOADED:
            raise InfrastructureError(f"{url}: HTTP {response.status_code}: {_reason(response)}")
        return response

    result: httpx.Response = retrying(once)
    return result


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase
