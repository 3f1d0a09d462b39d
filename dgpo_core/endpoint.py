"""A client of OpenAI-compatible endpoints: chat and text completions, with patience.

httpx is enough: two requests of JSON. OpenAI's own package would add its types and retries, which are below.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dgpo_core.config.endpoint import Endpoint, EndpointConfig
from dgpo_core.errors import InfrastructureError, UserError, may_pass
from dgpo_core.files import parsed_json

Message = dict[str, str]  # role and content
REFUSED = (401, 403, 404)  # key, permission, model or path: the same for every request
LONGEST_WAIT = 60.0  # seconds between two attempts


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Message(BaseModel):
    content: Any = None


class _Choice(BaseModel):
    message: _Message = _Message()
    text: Any = None
    finish_reason: str | None = None


class _Choices(BaseModel):
    """The answer to a completion, of which the first choice is read."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


A = TypeVar("A", bound=BaseModel)


class _MayPass(InfrastructureError):
    """A failure after which the same request may be answered."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote. `finish` is `stop` or `length`; tokens are counted as the server counts them."""

    text: str
    finish: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointClient:
    """Asks one model; may be used by several threads at once.

    What fails raises InfrastructureError after the configured attempts, and UserError where every request
    would fail: a wrong key, no such model.
    """

    def __init__(self, endpoint: Endpoint, config: EndpointConfig) -> None:
        self._endpoint, self._config = endpoint, config
        key = os.environ.get(config.key_variable)
        self._http = httpx.Client(
            base_url=endpoint.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.timeout,
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    @property
    def concurrency(self) -> int:
        """Return how many requests may be under way."""
        return self._config.concurrency

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def chat(self, messages: list[Message], **fields: Any) -> Reply:
        """Return the assistant's next message; `fields` are max_tokens, temperature, stop, ..."""
        answer = self._completed("/chat/completions", {"messages": messages, **fields})
        return self._reply(answer.choices[0].message.content, answer)

    def complete(self, prompt: str, **fields: Any) -> Reply:
        """Return what continues `prompt`."""
        answer = self._completed("/completions", {"prompt": prompt, **fields})
        return self._reply(answer.choices[0].text, answer)

    def models(self) -> list[str]:
        """Return the names of the server's models."""
        return [model.id for model in self._sent("GET", "/models", None, _Models).data]

    def _completed(self, path: str, body: dict[str, Any]) -> _Choices:
        return self._sent("POST", path, {"model": self._endpoint.model, **body}, _Choices)

    def _reply(self, text: object, answer: _Choices) -> Reply:
        finish, usage = answer.choices[0].finish_reason or "stop", answer.usage or _Usage()
        if finish not in ("stop", "length"):  # content_filter: the model was not asked
            raise InfrastructureError(f"{self._endpoint.url}: the answer ended by {finish}")
        told = text if isinstance(text, str) else ""
        # JSON can escape halves of surrogate pairs, which no file holds
        whole = told.encode("utf-8", "replace").decode()
        return Reply(whole, finish, usage.prompt_tokens or 0, usage.completion_tokens or 0)

    def _sent(self, method: str, path: str, body: dict[str, Any] | None, kind: type[A]) -> A:
        retrying = Retrying(
            retry=retry_if_exception_type(_MayPass),
            stop=stop_after_attempt(self._config.attempts),
            wait=wait_exponential(multiplier=0.5, max=LONGEST_WAIT),
            reraise=True,
        )
        found: A = retrying(self._once, method, path, body, kind)
        return found

    def _once(self, method: str, path: str, body: dict[str, Any] | None, kind: type[A]) -> A:
        place = f"{self._endpoint.url}{path}"
        try:
            answer = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _MayPass(f"{place} does not answer: {error or type(error).__name__}") from error
        told = f"{place} answers {answer.status_code}: {answer.text[:300]}"
        if may_pass(answer.status_code):
            raise _MayPass(told)
        if answer.status_code in REFUSED:
            key = self._config.key_variable
            raise UserError(f"{told} (model {self._endpoint.model}, key in ${key})")
        try:
            answer.raise_for_status()
            return kind.model_validate(parsed_json(answer.content))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "body"
            raise InfrastructureError(f"{told} ({key}: {first['msg']})") from error
        except (httpx.HTTPStatusError, ValueError) as error:
            raise InfrastructureError(told) from error
