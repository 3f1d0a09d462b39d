"""OpenAI's wire format of chat completions, as far as a search agent has it (strict: the rest is refused)."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dgpo_core.protocol.episode import Ending
from dgpo_core.serving.agent import Ask
from dgpo_core.serving.events import Event, Finished, Record


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """The agent's protocol has one user message, and no conversation before it."""

    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class TextFormat(Strict):
    type: Literal["text"]


def _neutral(*values: object) -> BeforeValidator:
    """For parameters that clients send with a value that asks for nothing."""

    def check(value: object) -> object:
        if value is not None and value not in values:
            raise ValueError(f"this agent supports only {' or '.join(map(str, values))}, not {value!r}")
        return value

    return BeforeValidator(check)


class ChatRequest(Strict):
    """`temperature` 0, greedy, is the default; `max_tokens` is of each turn of the model."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    n: Annotated[int | None, _neutral(1)] = None
    top_p: Annotated[float | None, _neutral(1)] = None
    presence_penalty: Annotated[float | None, _neutral(0)] = None
    frequency_penalty: Annotated[float | None, _neutral(0)] = None
    logprobs: Annotated[bool | None, _neutral(False)] = None
    response_format: TextFormat | None = None
    user: str | None = None  # this and the next two say nothing to a model
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None

    def ask(self) -> Ask:
        content = self.messages[0].content
        question = content if isinstance(content, str) else "".join(part.text for part in content)
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return Ask(
            question,
            temperature=self.temperature or 0.0,
            seed=self.seed or 0,
            max_new_tokens=min(limits, default=None),
        )


class Completion:
    """The answers to one request: a whole one, or chunks. Beside OpenAI's fields: `episode` and `event`.

    What a client puts together from `delta.content` is what it would get without `stream`: the answer.
    """

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, record: Record) -> dict[str, Any]:
        message = {"role": "assistant", "content": record.answer, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(record)}
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(record)}
        return {**body, "episode": record.model_dump(mode="json")}

    def opening(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """The chunk of an event; the last event has two: the answer, and why it ended."""
        told = {"event": event.model_dump(mode="json")}
        if not isinstance(event, Finished):
            return [self._chunk({}) | told]
        answer = event.episode.answer
        content = [self._chunk({"content": answer})] if answer is not None else []
        return [*content, self._chunk({}, _finish(event.episode)) | told]

    def usage(self, record: Record) -> dict[str, Any]:
        return {**self._chunk({}), "choices": [], "usage": usage(record)}

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def usage(record: Record) -> dict[str, int]:
    """Tokens: what the model wrote is the completion, everything that it was given is the prompt."""
    total = record.other_tokens + record.model_tokens
    return {
        "prompt_tokens": record.other_tokens,
        "completion_tokens": record.model_tokens,
        "total_tokens": total,
    }


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _finish(record: Record) -> str:
    return "stop" if record.ending is Ending.ANSWERED else "length"
