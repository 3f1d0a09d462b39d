"""A client of a retriever service: the field's POST /retrieve (Search-R1's server; docs/serve.md).

No answer, a broken one or one of another index is an InfrastructureError, never an empty result. The services
of the field answer in more than one way: a passage without an id is known by its contents, one without a
score by its rank, and of more passages than were asked for the first count.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from dgpo_core.datasets.records import Passage, unquoted
from dgpo_core.errors import InfrastructureError, UserError, may_pass
from dgpo_core.files import parsed_json
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.retrieval.request_size import batches, text_bytes

INDEX_HEADER = "X-Index-Digest"
KEY = "DGPO_RETRIEVER_KEY"  # variable of the environment with the services' key, on both sides
TIMEOUT = httpx.Timeout(60.0, connect=5.0)  # seconds; a batch of queries may have to be encoded on a CPU
ATTEMPTS = 3  # of one request
LONGEST_WAIT = 5.0  # seconds between two of them
BATCH = 256  # queries in one request
BATCH_BYTES = 500_000  # of them: half of what a proxy lets through that nobody has configured


class ServedIndex(NamedTuple):
    """The index that a service says it has; `passages` is 0 where it does not say."""

    digest: str
    passages: int


class InvalidAnswer(InfrastructureError):
    """An answer that is not in a retriever's format."""


class ServiceClient:
    """Searches at a service; every answer must be of the index that `digest` names."""

    def __init__(self, url: str, digest: str) -> None:
        self._url, self._digest = url, digest
        self._client = _http()
        self._check(describe_service(url).digest)

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return the best passages of each query, best first, as the service ranks them.

        Raises InfrastructureError when there is no answer, or none that can be trusted; UserError with the
        service's reason when it refuses the request.
        """
        found: list[list[Hit]] = []
        for part in batches(queries, BATCH, BATCH_BYTES, text_bytes):
            response = self._ask(part, top_k)
            if response.is_client_error and len(part) > 1:  # which of them is it?
                for query in part:
                    found += self._read(self._ask([query], top_k), [query], top_k)
            else:
                found += self._read(response, part, top_k)
        return found

    def require(self, queries: list[str], top_k: int) -> None:
        """Ask for the first time. Raise UserError when an answer is no retriever's, or no query finds any."""
        try:
            found = self.hits(queries, top_k)
        except InvalidAnswer as error:
            raise UserError(f"retrieval.location: {error}") from error
        if not any(found):
            raise UserError(
                f"retrieval.location: {self._url}/retrieve finds nothing for any of {len(queries)} "
                f"questions, as for {queries[0][:100]!r}; does it have the corpus?"
            )

    def _ask(self, queries: list[str], top_k: int) -> httpx.Response:
        body = {"queries": queries, "topk": top_k, "return_scores": True}
        return _request(self._client, "POST", f"{self._url}/retrieve", json=body)

    def _read(self, response: httpx.Response, queries: list[str], top_k: int) -> list[list[Hit]]:
        if response.is_client_error:
            asked = f" (query: {queries[0][:100]!r})" if len(queries) == 1 else ""
            raise UserError(f"{self._url}/retrieve refuses the request: {_reason(response)}{asked}")
        self._check(response.headers.get(INDEX_HEADER) or _unverified(self._url))
        try:
            return list(_results(response, len(queries), top_k))
        except ValueError as error:
            raise InvalidAnswer(
                f"{self._url}/retrieve does not answer as a retriever does (docs/serve.md): {error}"
            ) from error

    def _check(self, digest: str) -> None:
        if digest != self._digest:
            raise InfrastructureError(
                f"{self._url} serves the index {digest!r}, not {self._digest!r}, which data/index names; "
                "serve that one, or make data/index again from this one (dvc repro --force index)"
            )

    def close(self) -> None:
        self._client.close()


def describe_service(url: str) -> ServedIndex:
    """Ask a service which index it has; where it does not say, the address stands for the index.

    Raises InfrastructureError when there is no service, or one that is not ready.
    """
    with _http() as client:
        response = _request(client, "GET", f"{url}/health")
    said = None
    with suppress(ValueError):
        said = parsed_json(response.content)
    match said:
        case {"index": str(index), "passages": int(passages)} if index:
            return ServedIndex(index, passages)
    return ServedIndex(_unverified(url), 0)


def _http() -> httpx.Client:
    """Return a client that follows no redirection: the address is the one that was given, as is the key's."""
    key = os.environ.get(KEY)
    return httpx.Client(timeout=TIMEOUT, headers={"Authorization": f"Bearer {key}"} if key else {})


def _unverified(url: str) -> str:
    return f"unverified: {url}"


def _results(response: httpx.Response, queries: int, top_k: int) -> Iterator[list[Hit]]:
    """Read the passages of each query. Raise ValueError, naming what is missing."""
    try:
        answer = parsed_json(response.content)
    except ValueError:
        raise ValueError(f"HTTP {response.status_code}, {response.text[:60]!r} instead of JSON") from None
    results = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        raise ValueError('it has no list "result"')
    if len(results) != queries:
        raise ValueError(f"{len(results)} results for {queries} queries")
    for result in results:
        if not isinstance(result, list):
            raise ValueError(f"the passages of a query are no list, but {str(result)[:60]!r}")
        yield _hits(result[:top_k])


def _hits(items: list[Any]) -> list[Hit]:
    passages = [_passage(item.get("document", item) if isinstance(item, dict) else item) for item in items]
    scores = [_score(item.get("score")) for item in items]
    if None in scores:
        return [Hit(passage, 1 / rank) for rank, passage in enumerate(passages, 1)]
    return [Hit(passage, score) for passage, score in zip(passages, scores, strict=True) if score is not None]


def _passage(document: Any) -> Passage:
    """Read {"id", "contents"}, or "title" and "text" instead of the latter; either may lack its id."""
    if not isinstance(document, dict):
        raise ValueError(f'a passage without "document": {str(document)[:60]!r}')
    contents, title, text = (document.get(key) for key in ("contents", "title", "text"))
    if isinstance(contents, str):
        head, separator, rest = contents.partition("\n")
        title, text = (unquoted(head), rest) if separator else ("", contents)
    if not isinstance(text, str) or not isinstance(title or "", str) or not (title or text).strip():
        keys = ", ".join(map(repr, list(document)[:10]))
        raise ValueError(f'a document without "contents", or "title" and "text"; its keys are {keys}')
    name = document.get("id")
    if name in (None, "") or isinstance(name, bool | float | list | dict):
        name = "sha256:" + hashlib.sha256(f"{title}\n{text}".encode("utf-8", "replace")).hexdigest()[:16]
    return Passage(str(name), *(_valid(part) for part in (title or "", text)))


def _valid(text: str) -> str:
    """Replace half surrogate pairs, which JSON can escape and nothing can write."""
    return text.encode("utf-8", "replace").decode()


def _score(value: Any) -> float | None:
    """Return a number; None for null, nothing and what is not finite. Raise ValueError for all else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'"score" must be a number, not {str(value)[:60]!r}')
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has integers of any size
        return None


def _request(client: httpx.Client, method: str, url: str, **content: Any) -> httpx.Response:
    """Send a request, again while nobody answers or the service is overloaded; raise the service's errors."""
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
        if may_pass(response.status_code):
            raise InfrastructureError(f"{url}: HTTP {response.status_code}: {_reason(response)}")
        return response

    return retrying(once)


def _reason(response: httpx.Response) -> str:
    try:
        return str(parsed_json(response.content)["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase
