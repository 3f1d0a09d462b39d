"""A teacher behind an OpenAI-compatible endpoint: text in, text out, and no probabilities.

Its turns become tokens of the tokenizer that it is given, the student's. With `chat` the episode so far goes
as messages, the model's turns as the assistant's and what the environment has written as the user's: any
server renders them in its model's own template. With `completions` it goes as one text, as the student reads
it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dgpo_core.agent.engine import FinishReason, Generation, Request
from dgpo_core.agent.loop import stable_seed
from dgpo_core.agent.prompts import encode_text, message_text
from dgpo_core.agent.vllm_server import ServerSession
from dgpo_core.config.agent import Sampling
from dgpo_core.datasets.records import Question
from dgpo_core.endpoint import EndpointClient, Message, Reply


@dataclass
class _Conversation:
    """An episode as messages, and how many of its tokens are in them."""

    messages: list[Message] = field(default_factory=list)
    tokens: int = 0


class EndpointEngine:
    """An engine of text; a request's seed is (number of its question, seed of its sampling, turn)."""

    lane = None

    def __init__(
        self, client: EndpointClient, api: str, questions: list[Question], instruction: str, tokenizer: Any
    ) -> None:
        """`instruction`: a key of prompts.INSTRUCTIONS."""
        self._client, self._questions, self._instruction = client, questions, instruction
        self._tokenizer = tokenizer
        self._conversations: dict[int, _Conversation] = {}
        self._ask: Callable[..., Reply] = self._chat if api == "chat" else self._complete
        self._threads = client.concurrency

    def session(self, stop: tuple[str, ...]) -> ServerSession:
        self._conversations.clear()
        return ServerSession(lambda request, sampling: self._one(request, sampling, stop), self._threads)

    def _one(self, request: Request, sampling: Sampling, stop: tuple[str, ...]) -> Generation:
        fields: dict[str, Any] = {
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "stop": list(stop),
        }
        if sampling.temperature:
            fields["seed"] = stable_seed(*request.seed[1:]) >> 1  # servers take 31 bits
        reply = self._ask(request, **fields)
        text, stopped = _with_stop(reply, stop)
        ids = encode_text(text, self._tokenizer)
        finish = FinishReason.STOP if stopped else FinishReason.EOS
        if len(ids) > request.max_new_tokens or reply.finish == "length":
            ids, finish = ids[: request.max_new_tokens], FinishReason.LENGTH
        self._remember(request, ids)
        return Generation(ids, [0.0] * len(ids), finish)

    def _complete(self, request: Request, **fields: Any) -> Reply:
        return self._client.complete(self._tokenizer.decode(request.token_ids), **fields)

    def _chat(self, request: Request, **fields: Any) -> Reply:
        number, *_, turn = request.seed
        if not turn:
            message = message_text(self._questions[number].question, self._instruction)
            asked = _Conversation([{"role": "user", "content": message}])
            self._conversations[number] = asked
        else:
            asked = self._conversations[number]
            told = self._tokenizer.decode(request.token_ids[asked.tokens :]).strip()
            asked.messages.append({"role": "user", "content": told})
        return self._client.chat(asked.messages, **fields)

    def _remember(self, request: Request, ids: list[int]) -> None:
        if asked := self._conversations.get(request.seed[0]):
            asked.messages.append({"role": "assistant", "content": self._tokenizer.decode(ids)})
            asked.tokens = len(request.token_ids) + len(ids)


def _with_stop(reply: Reply, stop: tuple[str, ...]) -> tuple[str, bool]:
    """Return the text up to its first stop string, and whether it has one.

    Servers leave the string out at which they stop: it is put back where its tag is open.
    """
    ends = [reply.text.index(end) + len(end) for end in stop if end in reply.text]
    if ends:
        return reply.text[: min(ends)], True
    if reply.finish == "stop":
        for end in stop:
            if end.replace("/", "") in reply.text:
                return reply.text + end, True
    return reply.text, False
