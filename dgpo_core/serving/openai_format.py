"""OpenAI's format of chat completions, as far as a search agent has it.

A parameter that asks for nothing is accepted and changes nothing. One that would change the answer in a way
that the agent does not support is refused.
"""

import time
import uuid
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from dgpo_core.agent.episode import Ending
from dgpo_core.serving.events import AgentRequest, Delta, EpisodeEnd, EpisodeRecord, Event

SEEDS = 2**64  # OpenAI's seeds have a sign, ours have none


class Message(BaseModel):
    """A message of a conversation; `content` is read only where the message is the question."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None


class StreamOptions(BaseModel):
    include_usage: bool | None = False


def _last_of_user(messages: list[Message]) -> int:
    """Return the place of the user's last message, from 0. Raise ValueError where there is none."""
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    if not places:
        raise ValueError("this agent answers a question: one message must have the role user")
    return places[-1]


def _text(message: Message, number: int) -> str:
    """Return a message's text. Raise ValueError where it has other content."""
    if isinstance(message.content, str):
        return message.content
    if not isinstance(message.content, list):
        raise ValueError(f"message {number}: content must be a text, or a list of parts of type text")
    texts = []
    for part in message.content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"message {number}: this agent reads parts of type text only, not {kind!a:.40}")
        texts.append(text)
    return "".join(texts)


def _answerable(messages: list[Message]) -> list[Message]:
    place = _last_of_user(messages)
    _text(messages[place], place + 1)
    return messages


def _neutral(*values: object) -> BeforeValidator:
    """Return a check of a parameter that changes answers: null and `values` ask for nothing."""

    def check(value: object) -> object:
        if value is None or value in values:
            return None
        only = " or ".join(map(repr, values)) or "null"
        raise ValueError(f"this agent supports only {only}, not {value!a:.80}")

    return BeforeValidator(check)


class ChatRequest(BaseModel):
    """A question, the user's last message, with the conversation around it, which is read only if wanted.

    `temperature` 0, greedy, is the default; `max_tokens` is of each turn of the model. Other parameters than
    these (`metadata`, `reasoning_effort`, a client's `chat_id`, ...) do not change the answer: see `ignored`.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], AfterValidator(_answerable)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: int | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    max_completion_tokens: Annotated[int, Field(gt=0)] | None = None
    n: Annotated[None, _neutral(1)] = None
    stop: Annotated[None, _neutral("", [])] = None
    top_p: Annotated[None, _neutral(1)] = None
    presence_penalty: Annotated[None, _neutral(0)] = None
    frequency_penalty: Annotated[None, _neutral(0)] = None
    logit_bias: Annotated[None, _neutral({}, [])] = None
    logprobs: Annotated[None, _neutral(False)] = None
    top_logprobs: Annotated[None, _neutral(0)] = None
    tools: Annotated[None, _neutral([])] = None
    tool_choice: Annotated[None, _neutral("none", "auto")] = None
    functions: Annotated[None, _neutral([])] = None
    function_call: Annotated[None, _neutral("none", "auto")] = None
    response_format: Annotated[None, _neutral({"type": "text"})] = None
    modalities: Annotated[None, _neutral([], ["text"])] = None
    audio: Annotated[None, _neutral()] = None
    web_search_options: Annotated[None, _neutral()] = None
    # not OpenAI's, but sent by clients of engines that sample with them
    top_k: Annotated[None, _neutral(0, -1)] = None
    min_p: Annotated[None, _neutral(0)] = None
    repetition_penalty: Annotated[None, _neutral(1)] = None

    def ignored(self, history: bool = False) -> list[str]:
        """Return what was sent and not used: other messages, and unknown parameters that are not null."""
        read = 1 + (len(self._earlier()) if history else 0)
        others = ["messages"] if len(self.messages) > read else []
        return others + [name for name, value in (self.model_extra or {}).items() if value is not None]

    def agent_request(self, history: bool = False) -> AgentRequest:
        """Return what the agent is asked; with `history` the conversation before the question, too."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        place = _last_of_user(self.messages)
        return AgentRequest(
            _text(self.messages[place], place + 1),
            temperature=self.temperature or 0.0,
            seed=(self.seed or 0) % SEEDS,
            max_new_tokens=min(limits, default=None),
            history=tuple(self._earlier()) if history else (),
        )

    def _earlier(self) -> list[str]:
        """Return a line for each message of user and assistant before the question that is text."""
        lines = []
        for number, message in enumerate(self.messages[: _last_of_user(self.messages)], 1):
            if message.role in ("user", "assistant"):
                with suppress(ValueError):  # a picture, or a call of a tool
                    lines.append(f"{message.role}: {' '.join(_text(message, number).split())}")
        return lines


class Completion:
    """Builds the response to one request, whole or in chunks; beside OpenAI's fields, `episode` and `event`.

    What a client puts together from `delta.content` is what it would get without `stream`: the answer. So it
    is with `reasoning_content`, where clients of reasoning models look (DeepSeek's field): what the model
    thinks and searches for, each turn in paragraphs of its own.
    """

    def __init__(self, model: str) -> None:
        self._reasoning = ""
        self._paragraph: tuple[str, int] | None = None  # kind and turn
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, record: EpisodeRecord) -> dict[str, Any]:
        """Return the response in one piece, with the reasoning of the events before."""
        message = {"role": "assistant", "content": record.answer, "refusal": None}
        message |= {"reasoning_content": self._reasoning or None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(record)}
        body = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(record)}
        return {**body, "episode": record.model_dump(mode="json")}

    def opening(self) -> dict[str, Any]:
        """Return the chunk that comes first."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Return the chunk of an event; the last event has two: the answer, and why it ended."""
        event_field = {"event": event.model_dump(mode="json")}
        if not isinstance(event, EpisodeEnd):
            reasoning = self.reason(event)
            return [self._chunk({"reasoning_content": reasoning} if reasoning else {}) | event_field]
        answer = event.episode.answer
        content = [self._chunk({"content": answer})] if answer is not None else []
        return [*content, self._chunk({}, _finish(event.episode)) | event_field]

    def reason(self, event: Event) -> str:
        """Return what an event adds to the reasoning."""
        if not isinstance(event, Delta) or event.kind not in ("think", "search"):
            return ""
        text = event.text
        if self._paragraph != (event.kind, event.turn):
            if not text.strip():
                return ""
            self._paragraph = (event.kind, event.turn)
            gap = "\n\n" if self._reasoning else ""
            text = f"{gap}{'Search: ' if event.kind == 'search' else ''}{text.lstrip()}"
        self._reasoning += text
        return text

    def usage(self, record: EpisodeRecord) -> dict[str, Any]:
        """Return the chunk that comes last, where a client asks for it."""
        return {**self._chunk({}), "choices": [], "usage": usage(record)}

    def _chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


def usage(record: EpisodeRecord) -> dict[str, int]:
    """Count tokens: what the model wrote is the completion, everything that it was given is the prompt."""
    total = record.other_tokens + record.model_tokens
    return {
        "prompt_tokens": record.other_tokens,
        "completion_tokens": record.model_tokens,
        "total_tokens": total,
    }


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the body of a response that is no answer."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _finish(record: EpisodeRecord) -> str:
    return "stop" if record.ending is Ending.ANSWERED else "length"
