"""What the agent loop asks of an engine: token ids in, token ids out."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from dgpo_core.config.protocol import Sampling


class Finish(StrEnum):
    STOP = "stop"  # a stop string was completed
    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True)
class Request:
    """One continuation. The same request with the same seed samples the same tokens, up to rounding."""

    token_ids: list[int]
    max_new_tokens: int
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """Sampled ids (with the EOS that ended them) and their log-probabilities in nats."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Finish


class Engine(Protocol):
    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        """Continue each request until a stop string, EOS or its limit; answers in the requests' order."""
        ...
