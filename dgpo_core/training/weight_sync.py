"""Agent loops around a model in training: it generates itself, or an engine with the same weights does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dgpo_core.agent.engine import Request, SeparateEngine, generate, weights_of
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import ProbeConfig, ProtocolConfig, Sampling
from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.objectives.logprobs import engine_gap, token_logprobs
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.training import parallel
from dgpo_core.training.batches import TokenSequence, backbone_of, collate, counted_hidden, head_of
from dgpo_core.training.checkpoint import require_finite
from dgpo_core.training.parallel import autocast

PROBED = Sampling(temperature=1.0)


@dataclass
class EngineSync:
    """Gives `engine` the weights of `model`, and checks that both then compute the same.

    The probe continues `prompts` (token ids), the same ones each time: what the engine has cached of them
    with other weights would show, and so would weights that have not arrived. The engine samples from the
    first `known` ids; None: from all that the model has rows for.
    """

    engine: SeparateEngine
    model: PreTrainedModel
    prompts: list[list[int]]
    config: ProbeConfig
    compute: ComputeConfig
    known: int | None = None

    def refresh(self) -> None:
        """Move the weights. Raise UserError when engine and model then disagree."""
        self.engine.refresh(weights_of(self.model))
        gap = self.probe()
        if not gap["engine_gap_mean"] <= self.config.tolerance:  # nan too
            raise UserError(
                "rollout.probe.tolerance: after a refresh engine and model give different log-probabilities: "
                f"mean difference {gap['engine_gap_mean']:.3g} nats, largest {gap['engine_gap_max']:.3g}, "
                f"allowed mean {self.config.tolerance:g}. Either the weights did not arrive (try "
                "rollout.refresh: file), or rollout.precision and compute.precision are too far apart"
            )

    def probe(self) -> dict[str, float]:
        """Measure the `engine_gap` of the two on tokens that the engine samples.

        Raise NotFinite when the model gives no numbers.
        """
        requests = [Request(ids, self.config.tokens, (i,)) for i, ids in enumerate(self.prompts)]
        answers = generate(self.engine, requests, PROBED, ())
        sequences = [
            TokenSequence(ids + answer.token_ids, list(range(len(ids), len(ids) + len(answer.token_ids))))
            for ids, answer in zip(self.prompts, answers, strict=True)
        ]
        batch = collate(sequences, self.model.device)
        with torch.no_grad(), autocast(self.compute):
            hidden = counted_hidden(backbone_of(self.model), batch)
            head = head_of(self.model)[: self.known]
            own = token_logprobs(hidden, head, batch.targets, PROBED.temperature)[0]
        require_finite({"log-probability of a sampled token": own.sum().item()})
        return engine_gap(own.cpu(), torch.tensor([value for answer in answers for value in answer.logprobs]))


class SharedLoop:
    """Runs the agent loop with the model in training itself: each of several processes runs its share."""

    def __init__(self, loop: AgentLoop) -> None:
        self._loop, self._group = loop, parallel.further_group()

    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        """Return all episodes, in order, in every process."""
        return _shared(lambda: self._loop.run(parallel.share(tasks), sampling), self._group)


class SyncedLoop:
    """Runs the agent loop with an engine of its own, which gets the model's weights before each run.

    Training moves the weights between two runs; a refresh that belongs to a run cannot be forgotten. The
    first of several processes asks the engine; the others, which have no `sync`, get its episodes.
    """

    def __init__(
        self,
        sync: EngineSync | None,
        tokenizer: Any,
        retriever: Retriever,
        config: ProtocolConfig,
        top_k: int,
    ) -> None:
        self._sync, self._group = sync, parallel.further_group()
        self._loop = AgentLoop(sync.engine, tokenizer, retriever, config, top_k) if sync else None

    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        """Return all episodes, in order, in every process."""
        return _shared(lambda: self._run(tasks, sampling), self._group)

    def _run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        if self._sync is None or self._loop is None:
            return []
        self._sync.refresh()
        try:
            return self._loop.run(tasks, sampling)
        finally:
            self._sync.engine.sleep()


def _shared(run: Callable[[], list[Episode]], group: dist.ProcessGroup | None) -> list[Episode]:
    """Return the episodes of all processes; where one raises NotFinite, raise it in every process."""
    own: list[Episode] = []
    broken: list[tuple[str, float, str]] = []
    try:
        own = run()
    except NotFinite as error:
        broken = [(error.quantity, error.value, error.cure)]
    for told in parallel.gather(broken, group):
        raise NotFinite(*told)
    return parallel.gather(own, group)
