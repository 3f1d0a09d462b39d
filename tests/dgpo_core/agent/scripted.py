"""An engine that writes given texts, a retriever that answers as told, and a reference for real engines."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.engine import FinishReason, FunctionSession, Generation, Request
from dgpo_core.config.agent import Sampling
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError
from dgpo_core.retrieval.ranking import Hit

Script = Callable[[tuple[int, ...], int], str]  # (the task's seed, turn) -> text


class ScriptedEngine:
    """Cuts a text at its limit of new tokens, as an engine must; every token has log-probability -0.5."""

    lane: int | None = None

    def __init__(self, tokenizer: Any, script: Script) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.requests: list[Request] = []

    def session(self, stop: tuple[str, ...]) -> FunctionSession:
        def answer(request: Request) -> Generation:
            self.requests.append(request)
            return self.answer(request, stop)

        return FunctionSession(answer)

    def answer(self, request: Request, stop: tuple[str, ...]) -> Generation:
        *seed, turn = request.seed
        text = self.script(tuple(seed), turn)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        finish = FinishReason.STOP if any(end in text for end in stop) else FinishReason.EOS
        if len(ids) > request.max_new_tokens:
            ids, finish = ids[: request.max_new_tokens], FinishReason.LENGTH
        return Generation(ids, [-0.5] * len(ids), finish)


class Answering:
    """Always finds the same passages; the first `failures` calls fail."""

    digest = "answering"

    def __init__(self, passages: list[Passage] | None = None, failures: int = 0) -> None:
        self.passages = passages or [Passage("7", "Ada", "Ada was born in Paris.")]
        self.failures, self.calls = failures, 0
        self.queries: list[str] = []

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        self.calls += 1
        if self.calls <= self.failures:
            raise InfrastructureError("the index is down")
        self.queries += queries
        hits = [Hit(passage, 9.0 - i) for i, passage in enumerate(self.passages[:top_k])]
        return [hits for _ in queries]


def forward_logprobs(
    model: PreTrainedModel, request: Request, ids: list[int], sampling: Sampling
) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of the continuation `ids`, by one pass over the whole text."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([request.token_ids + ids])).logits[0].float()
    return (logits / (sampling.temperature or 1.0)).log_softmax(-1)[len(request.token_ids) - 1 : -1]


def own_logprobs(model: PreTrainedModel, request: Request, ids: list[int], sampling: Sampling) -> list[float]:
    """The log-probabilities of `ids` themselves."""
    table = forward_logprobs(model, request, ids, sampling)
    found: list[float] = table[torch.arange(len(ids)), ids].tolist()
    return found
