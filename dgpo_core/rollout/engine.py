"""What the agent loop asks of an engine: token ids in, token ids out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import torch

from dgpo_core.config.protocol import Sampling


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
