"""What the agent loop asks of an engine: token ids in, token ids out.

When a generation has ended: EOS, a completed stop string, or its limit; the same for every engine.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch

from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.agent import Sampling


class Finish(StrEnum):
    STOP = "stop"  # a stop string was completed
    EOS = "eos"
    LENGTH = "length"


@dataclass(eq=False)
class Memory:
    """What an engine keeps of an episode between its turns; `kept` is the engine's own business.

    It belongs to one run of one policy: an engine whose weights change is never shown an older one. In the
    episode's last turn nothing new is `wanted`: what is there may be used, and need not be renewed.
    """

    kept: Any = None
    wanted: bool = True

    def forget(self) -> None:
        self.kept = None


@dataclass(frozen=True)
class Request:
    """One continuation. The same request with the same seed samples the same tokens, up to rounding.

    With `memory` an engine may keep there what it computed, and use what it finds.
    """

    token_ids: list[int]
    max_new_tokens: int
    seed: tuple[int, ...]
    memory: Memory | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Generation:
    """Sampled ids (with the EOS that ended them) and their log-probabilities in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish


# A fresh pass over a model's names and tensors. A head that is tied to the embedding has its own name too:
# vLLM's CPU workers keep a packed copy of it, which nothing else renews.
Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]


def weights_of(model: torch.nn.Module) -> Weights:
    return lambda: model.named_parameters(remove_duplicate=False)


class Engine(Protocol):
    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        """Continue each request until a stop string, EOS or its limit; answers in the requests' order."""
        ...


class SeparateEngine(Engine, Protocol):
    """An engine with weights of its own: a model that is trained must give it the new ones."""

    def refresh(self, weights: Weights) -> None:
        """Generate with these from now on, and forget what was computed with others.

        Raises InfrastructureError.
        """
        ...

    def rest(self) -> None:
        """Nothing is generated until the next refresh: what the engine holds may serve others."""
        ...


TAIL = 16  # tokens decoded to look for a stop string: more than any stop string has


class Endings:
    """Reads sampled ids. A stop string may end inside a token, which is then kept whole: it was sampled.

    `eos` are the ids that end a generation, `rows` is the number of the model's output ids. The first `known`
    of them have a token; the `unknown` ones behind them must never be sampled.
    """

    def __init__(self, tokenizer: Any, eos: set[int], rows: int) -> None:
        self.eos = eos
        self.known = min(known_ids(tokenizer), rows)
        self.unknown = range(self.known, rows)
        self._tokenizer = tokenizer
        self._may_stop: dict[tuple[str, ...], list[bool]] = {}

    def after(self, ids: list[int], limit: int, stop: tuple[str, ...]) -> Finish | None:
        """How a generation of `ids` has ended with its last token; None when it goes on."""
        if ids[-1] in self.eos:
            return Finish.EOS
        if self._can_stop(stop)[ids[-1]]:
            text = self._tokenizer.decode(ids[-TAIL:])
            if any(ending in text for ending in stop):
                return Finish.STOP
        return Finish.LENGTH if len(ids) >= limit else None

    def first(self, ids: list[int], limit: int, stop: tuple[str, ...]) -> tuple[int, Finish | None]:
        """How many of `ids` belong to the generation, and how it has ended."""
        for count in range(1, len(ids) + 1):
            if finish := self.after(ids[:count], limit, stop):
                return count, finish
        return len(ids), None

    def _can_stop(self, stop: tuple[str, ...]) -> list[bool]:
        """For each id, whether it can hold the last character of a stop string.

        A table, so that only few sampled tokens need decoding to look for a stop string.
        """
        if stop not in self._may_stop:
            last = {text[-1] for text in stop}
            texts = self._tokenizer.batch_decode([[i] for i in range(self.known)])
            self._may_stop[stop] = [bool(last & set(text)) for text in texts] + [False] * len(self.unknown)
        return self._may_stop[stop]


def end_tokens(tokenizer: Any, settings: Any | None) -> set[int]:
    """The tokenizer's EOS and those of the model's generation settings (Qwen2.5 has two, Llama three)."""
    configured = getattr(settings, "eos_token_id", None)
    own = configured if isinstance(configured, list) else [configured]
    return {token for token in (tokenizer.eos_token_id, *own) if token is not None}
