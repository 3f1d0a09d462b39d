"""A client of vLLM servers: one copy of the model each, on GPUs of their own, here or on other machines."""

import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dgpo_core.agent.engine import Finished, Generation, Request, Weights, weights_of
from dgpo_core.agent.loop import stable_seed
from dgpo_core.agent.vllm_engine import (
    LOGPROBS_MODE,
    UNTOUCHED,
    Transfer,
    load_stop_criteria,
    read_generation,
    require_version,
    sampling_fields,
    server_transfer,
    weights_in_folder,
)
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.errors import InfrastructureError, UserError, may_pass, without_credentials
from dgpo_core.models import load_model

GENERATE = "/inference/v1/generate"  # token ids in, token ids out
WAIT = 0.05  # seconds after which searches that are done are seen to
HOW_TO_START = "start it as docs/vllm.md says"


class VllmServerEngine:
    """Spreads requests over servers of the same model; turns of one episode go to the same server."""

    def __init__(
        self, urls: list[str], source: str, tokenizer: Any, config: RolloutConfig, max_context: int
    ) -> None:
        """Check each server, and give it the weights in `source` (folder or hub name) unless it has them.

        `max_context`: tokens of the longest prompt with what is generated after it. Raises UserError for a
        server that was started with other settings, and InfrastructureError for one that does not answer.
        """
        self._config = config
        self.stop_criteria = load_stop_criteria(source, tokenizer)
        self._servers = [_Server(url, config) for url in urls]
        self._client = uuid.uuid4().hex[:8]
        self._refreshes = 0
        self._version = UNTOUCHED
        for server in self._servers:
            server.require(max_context, self.stop_criteria.eos)
        if any(not server.has_untouched(source) for server in self._servers):
            self._reload(weights_of(load_model(source)))

    @property
    def lane(self) -> int | None:
        """Return None: servers want all requests at once."""
        return None

    def session(self, stop: tuple[str, ...]) -> "ServerSession":
        """Return a session whose requests fail when a server does, or has other weights."""
        threads = self._config.server.concurrency * len(self._servers)
        return ServerSession(lambda request, sampling: self._one(request, sampling, stop), threads)

    def _one(self, request: Request, sampling: Sampling, stop: tuple[str, ...]) -> Generation:
        # without the turn, which comes last: the server that has the earlier turns in its cache
        server = self._servers[stable_seed(*request.seed[:-1]) % len(self._servers)]
        choice = server.generate(
            request.token_ids, sampling_fields(request, sampling, stop, self.stop_criteria)
        )
        with _reading(GENERATE):
            require_version([span["version"] for span in choice["weight_versions"] or ()], self._version)
            logprobs = [float(step["logprob"]) for step in choice["logprobs"]["content"]]
            ids, reason = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
        return read_generation(request, ids, logprobs, reason, self.stop_criteria, stop)

    def refresh(self, weights: Weights) -> None:
        """Give the weights to every server. Raises UserError for a server that allows none."""
        if self._config.refresh == "file":
            self._reload(weights)
            return
        self._announce_version()
        for server in self._servers:
            server.receive(weights)
            server.forget()

    def sleep(self) -> None:
        """Do nothing: a server keeps its GPUs."""

    def _reload(self, weights: Weights) -> None:
        self._announce_version()
        with weights_in_folder(weights, self._config) as folder:
            for server in self._servers:
                server.load(folder)
                server.forget()

    def _announce_version(self) -> None:
        """Name the next weights before they are loaded: half-loaded ones must not pass for those before."""
        self._refreshes += 1
        self._version = f"{self._client}-{self._refreshes}"
        for server in self._servers:
            server.set_version(self._version)


class ServerSession:
    """Requests at servers, which batch them as they come; each is a thread that waits for its answer."""

    paced = False

    def __init__(self, answer: Callable[[Request, Sampling], Generation], threads: int) -> None:
        self._answer, self._threads = answer, ThreadPoolExecutor(threads)
        self._under_way: dict[Future[Generation], Request] = {}

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        for request in requests:
            self._under_way[self._threads.submit(self._answer, request, sampling)] = request

    def advance(self) -> list[Finished]:
        """Return what is answered; wait up to WAIT seconds for the first."""
        done = wait(self._under_way, WAIT, FIRST_COMPLETED).done
        finished: list[Finished] = []
        for future in done:
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            finished.append((self._under_way.pop(future), error or future.result()))
        return finished

    def close(self) -> None:
        """Forget requests that have not been sent."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn an answer that lacks something, or has something else there, into a failure of the server."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise InfrastructureError(f"{what} does not answer as vLLM does: {error!r}") from error


class _Server:
    """One server's HTTP interface; a request that fails is tried again, then is an InfrastructureError."""

    def __init__(self, url: str, config: RolloutConfig) -> None:
        self._settings = config.server
        self._name = without_credentials(url)
        self._url = url.rstrip("/")
        key = os.environ.get("VLLM_API_KEY")  # the server's own name for it
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.server.timeout,
            limits=httpx.Limits(max_connections=config.server.concurrency),
        )
        self._transfer: Transfer | None = None
        self._dtype: torch.dtype = getattr(torch, config.precision)

    def require(self, max_context: int, eos: set[int]) -> None:
        """Raise UserError when episodes do not fit or log-probabilities are not those at the temperature."""
        with _reading(f"{self._name}/v1/models"):
            longest = int(self._get("/v1/models")["data"][0]["max_model_len"])
        if longest < max_context:
            raise UserError(
                f"{self._name}: max_model_len is {longest}, but protocol.max_context is "
                f"{max_context}: {HOW_TO_START}"
            )
        # among the likeliest token alone its probability is 1; the raw one is not
        fields = {"temperature": 1.0, "top_k": 1, "max_tokens": 8, "logprobs": 0, "ignore_eos": True}
        choice = self.generate([min(eos)], fields)
        with _reading(f"{self._name}{GENERATE}"):
            lowest = min(float(step["logprob"]) for step in choice["logprobs"]["content"])
        if not lowest >= -1e-4:  # nan too
            raise UserError(
                f"{self._name}: returns raw log-probabilities, not those that it samples with: start it with "
                f"--logprobs-mode {LOGPROBS_MODE}"
            )

    def has_untouched(self, source: str) -> bool:
        """Return whether it was started with the weights in `source` and has them still."""
        with _reading(f"{self._name}/v1/models"):
            root = str(self._get("/v1/models")["data"][0]["root"])
        same = root == source or (Path(source).is_dir() and Path(root).resolve() == Path(source).resolve())
        info = self._request("GET", "/weight_info")
        if info.status_code == httpx.codes.NOT_FOUND:  # it allows no changes
            if not same:
                raise UserError(
                    f"{self._name}: serves {root}, not {source}, and allows no changes: {HOW_TO_START}"
                )
            return True
        with _reading(f"{self._name}/weight_info"):
            return bool(same and info.json()["weight_version"] == UNTOUCHED)

    def generate(self, ids: list[int], fields: dict[str, Any]) -> dict[str, Any]:
        with _reading(f"{self._name}{GENERATE}"):
            answer = self._post(GENERATE, {"token_ids": ids, "sampling_params": fields})
            choice: dict[str, Any] = answer["choices"][0]
            return choice

    def load(self, folder: str) -> None:
        """Load the weights of a folder that has the same path there."""
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})

    def receive(self, weights: Weights) -> None:
        if self._transfer is None:
            with _reading(f"{self._name}/get_world_size"):
                workers = int(self._get("/get_world_size")["world_size"])
            self._transfer = server_transfer(self._url, workers, self._dtype)
        try:
            self._transfer.send(weights)
        except (RuntimeError, OSError) as error:
            raise InfrastructureError(f"{self._name}: cannot be sent weights: {error}") from error

    def set_version(self, version: str) -> None:
        self._post("/update_weight_version", {"new_version": version})

    def forget(self) -> None:
        """Drop what was computed with other weights."""
        with _reading(f"{self._name}/reset_prefix_cache"):
            done = self._post("/reset_prefix_cache", {})["success"]
        if not done:
            raise InfrastructureError(
                f"{self._name}: keeps prefixes computed with old weights; who else uses it?"
            )

    def _get(self, path: str) -> Any:
        return self._checked("GET", path).json()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._checked("POST", path, json=body).json()

    def _checked(self, method: str, path: str, **content: Any) -> httpx.Response:
        answer = self._request(method, path, **content)
        if answer.status_code == httpx.codes.NOT_FOUND:
            raise UserError(f"{self._name}: there is no {path}: {HOW_TO_START}")
        if answer.is_client_error:
            raise UserError(f"{self._name}: refuses {path}: {answer.text[:300]}")
        return answer

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Send a request, again when the server cannot be reached or fails. Raises InfrastructureError."""
        retrying = Retrying(
            retry=retry_if_exception_type(InfrastructureError),
            stop=stop_after_attempt(self._settings.attempts),
            wait=wait_exponential(multiplier=0.5, max=30),
            reraise=True,
        )

        def once() -> httpx.Response:
            try:
                answer = self._http.request(method, path, **content)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                raise InfrastructureError(f"{self._name}: does not answer: {reason}") from error
            if may_pass(answer.status_code):
                status, text = answer.status_code, answer.text[:300]
                raise InfrastructureError(f"{self._name}: {path} failed ({status}): {text}")
            return answer

        return retrying(once)
