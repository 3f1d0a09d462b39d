"""The interface between the agent loop and an engine: token ids in, token ids and log-probabilities out.

Requests join a `Session` at any time and leave it when they are finished, so that none waits for another.
`StopCriteria` decides when a generation has ended, in the same way for every engine.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import torch

from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.agent import Sampling
from dgpo_core.errors import InfrastructureError


class FinishReason(StrEnum):
    STOP = "stop"  # a stop string was completed
    EOS = "eos"
    LENGTH = "length"


@dataclass(eq=False)
class EpisodeCache:
    """What an engine computed in an episode's earlier turns; only the engine knows what `content` is.

    It belongs to one run of one policy: an engine whose weights change is never given an older one. In the
    last turn of an episode `renew` is false: the engine may use the content and need not replace it.
    """

    content: Any = None
    renew: bool = True

    def clear(self) -> None:
        self.content = None


@dataclass(frozen=True)
class Request:
    """One continuation. The same request with the same seed samples the same tokens, up to rounding.

    An engine may use what it finds in `cache`, and leave there what it has computed. `on_token` is called
    with each token when it is sampled, EOS too, by engines that sample in this process; what it raises ends
    the request.
    """

    token_ids: list[int]
    max_new_tokens: int
    seed: tuple[int, ...]
    cache: EpisodeCache | None = field(default=None, compare=False, repr=False)
    on_token: Callable[[int], None] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Generation:
    """Sampled ids (with the EOS that ended them) and their log-probabilities in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish: FinishReason


# A fresh pass over a model's names and tensors. A head that is tied to the embedding has its own name too:
# vLLM's CPU workers keep a packed copy of it, which nothing else renews.
Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]


def weights_of(model: torch.nn.Module) -> Weights:
    return lambda: model.named_parameters(remove_duplicate=False)


# A request and what became of it: a failure of the engine, or what `on_token` raised, instead of tokens.
Finished = tuple[Request, Generation | Exception]


class Session(Protocol):
    """Requests that are continued together, each until a stop string, EOS or its limit.

    With `paced` the same calls give the same generations to the bit.
    """

    paced: bool

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        """Let requests join."""
        ...

    def advance(self) -> list[Finished]:
        """Generate for a while and return the requests that are finished; often there are none."""
        ...

    def close(self) -> None:
        """Release what the session holds."""
        ...


class Engine(Protocol):
    """`lane`: how many episodes one session runs best where sessions run side by side; None: all in one."""

    @property
    def lane(self) -> int | None: ...

    def session(self, stop: tuple[str, ...]) -> Session: ...


class FunctionSession:
    """Answers each request with a function, which may raise InfrastructureError, at the next `advance`."""

    paced = True

    def __init__(self, answer: Callable[[Request], Generation]) -> None:
        self._answer = answer
        self._added: list[Request] = []

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        self._added += requests

    def advance(self) -> list[Finished]:
        added, self._added = self._added, []
        return [(request, self._result(request)) for request in added]

    def _result(self, request: Request) -> Generation | Exception:
        try:
            return self._answer(request)
        except InfrastructureError as error:
            return error

    def close(self) -> None:
        """Do nothing."""


def generate(
    engine: Engine, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
) -> list[Generation]:
    """Continue all requests; return their generations in order, or raise the first error."""
    found: dict[int, Generation] = {}
    session = engine.session(stop)
    try:
        session.add(requests, sampling)
        while len(found) < len(requests):
            for request, result in session.advance():
                if isinstance(result, Exception):
                    raise result
                found[id(request)] = result
    finally:
        session.close()
    return [found[id(request)] for request in requests]


class GuidedEngine:
    """Lets a teacher write some turns of a student's episodes (Guided-OPD, Li et al., 2026).

    Each turn is the teacher's with the probability `intervention`, 0 but within `intervening`; which ones
    are depends on the requests' seeds alone.
    """

    def __init__(self, student: Engine, teacher: Engine) -> None:
        self._student, self._teacher = student, teacher
        self.intervention = 0.0

    @property
    def lane(self) -> int | None:
        return self._student.lane

    @contextmanager
    def intervening(self, probability: float) -> Iterator[None]:
        self.intervention = probability
        try:
            yield
        finally:
            self.intervention = 0.0

    def session(self, stop: tuple[str, ...]) -> "GuidedSession":
        return GuidedSession(self._student.session(stop), self._teacher.session(stop), self.intervention)


class GuidedSession:
    """Requests of which the student or, with the probability `intervention`, the teacher does each.

    What is cached of an episode is the student's: the teacher reads its turns' beginnings anew.
    """

    def __init__(self, student: Session, teacher: Session, intervention: float) -> None:
        self._student, self._teacher, self._intervention = student, teacher, intervention
        self._asked: dict[int, Request] = {}  # by the identity of what the teacher was given in its place
        self.paced = student.paced and teacher.paced

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        for request in requests:
            if random.Random(f"intervention-{request.seed}").random() >= self._intervention:
                self._student.add([request], sampling)
                continue
            own = replace(request, cache=None)
            self._asked[id(own)] = request
            self._teacher.add([own], sampling)

    def advance(self) -> list[Finished]:
        taught = [(self._asked.pop(id(own)), result) for own, result in self._teacher.advance()]
        return taught + self._student.advance()

    def close(self) -> None:
        self._teacher.close()
        self._student.close()


class SeparateEngine(Engine, Protocol):
    """An engine with weights of its own: whoever trains a model must give it the new ones."""

    def refresh(self, weights: Weights) -> None:
        """Generate with these from now on, and forget what was computed with others.

        Raises InfrastructureError.
        """
        ...

    def sleep(self) -> None:
        """Release what others may use until the next refresh; nothing is generated before it."""
        ...


TAIL = 16  # tokens decoded to look for a stop string: more than any stop string has


class StopCriteria:
    """Decides whether sampled ids end a generation.

    A stop string may end inside a token, which is then kept whole, because it was sampled. `eos` are the ids
    that end a generation, `rows` is the number of the model's output ids. The first `known` of them have a
    token; the `unknown` ones behind them must never be sampled.
    """

    def __init__(self, tokenizer: Any, eos: set[int], rows: int) -> None:
        self.eos = eos
        self.known = min(known_ids(tokenizer), rows)
        self.unknown = range(self.known, rows)
        self._tokenizer = tokenizer
        self._may_end: dict[tuple[str, ...], list[bool]] = {}

    def finish(self, ids: list[int], limit: int, stop: tuple[str, ...]) -> FinishReason | None:
        """Return why a generation of `ids` ends with its last token; None when it goes on."""
        if ids[-1] in self.eos:
            return FinishReason.EOS
        if self.may_end(stop)[ids[-1]]:
            text = self._tokenizer.decode(ids[-TAIL:])
            if any(ending in text for ending in stop):
                return FinishReason.STOP
        return FinishReason.LENGTH if len(ids) >= limit else None

    def first_finish(
        self, ids: list[int], limit: int, stop: tuple[str, ...]
    ) -> tuple[int, FinishReason | None]:
        """Return how many of `ids` belong to the generation, and why it ends there."""
        for count in range(1, len(ids) + 1):
            if reason := self.finish(ids[:count], limit, stop):
                return count, reason
        return len(ids), None

    def may_end(self, stop: tuple[str, ...]) -> list[bool]:
        """Return for each id whether its token can end a generation: EOS, or a stop string's last character.

        Thanks to this table only few sampled tokens are decoded to look for a stop string.
        """
        if stop not in self._may_end:
            last = {text[-1] for text in stop}
            texts = self._tokenizer.batch_decode([[i] for i in range(self.known)])
            known = [i in self.eos or bool(last & set(text)) for i, text in enumerate(texts)]
            self._may_end[stop] = known + [False] * len(self.unknown)
        return self._may_end[stop]


def eos_ids(tokenizer: Any, settings: Any | None) -> set[int]:
    """Return the tokenizer's EOS and those of the generation settings (Qwen2.5 has two, Llama three)."""
    configured = getattr(settings, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *own) if token is not None}
