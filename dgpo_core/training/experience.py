"""From episodes to what PPO trains on: log-probabilities, values, rewards and advantages."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig, Recipe, ReinforceConfig
from dgpo_core.objectives import rewards as reward_functions
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import distillation_terms, token_logprobs
from dgpo_core.objectives.policy import explained_variance, gae, whiten
from dgpo_core.protocol.episode import Ending, Episode, Owner
from dgpo_core.training.batches import (
    Sequence,
    TokenBatch,
    backbone_of,
    collate,
    counted_hidden,
    head_of,
    micro_batches,
    model_sequence,
    response_sequence,
)
from dgpo_core.training.compute import autocast
from dgpo_core.training.critic import Critic

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Experience:
    """One entry an episode; tensors [model tokens of the episode] unless said otherwise.

    `value_sequences`, `values` and `returns` cover the tokens of `gae_scope`: the model's, or all of the
    response. `kl` is the estimate against the reference, nats, zero where the gate is closed.
    """

    sequences: list[Sequence]
    old_logprobs: Tensors
    advantages: Tensors
    value_sequences: list[Sequence]
    values: Tensors
    returns: Tensors
    kl: Tensors
    rewards: Tensors
    gated: list[bool]


@dataclass
class ExperienceMaker:
    student: PreTrainedModel
    reference: PreTrainedModel | None
    critic: Critic
    recipe: Recipe
    config: ReinforceConfig
    compute: ComputeConfig

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        sequences = [model_sequence(episode) for episode in episodes]
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(e) for e in episodes] if whole else sequences
        correct = torch.tensor([episode.correct for episode in episodes])
        open_gate = reward_functions.gate(correct, self.recipe.guidance)
        gated = [bool(g) for g in open_gate]
        old = self._old_logprobs(episodes, sequences)
        kl = self._kl(sequences, old, gated)
        values = self._each(value_sequences, self.critic)
        # model tokens among the tokens that have a value
        owned = [
            torch.tensor([e.owners[p] == Owner.MODEL for p in s.positions])
            for e, s in zip(episodes, value_sequences, strict=True)
        ]
        scattered = [torch.zeros(len(o)).masked_scatter(o, k) for o, k in zip(owned, kl, strict=True)]
        mask = pad_sequence([torch.ones(len(o)) for o in owned], batch_first=True)
        rewards = reward_functions.token_rewards(
            correct, pad_sequence(scattered, batch_first=True), mask, open_gate, self.config.beta
        )
        padded_values = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)
        lengths = [len(o) for o in owned]
        return Experience(
            sequences,
            old,
            [a[:n][o] for a, n, o in zip(advantages, lengths, owned, strict=True)],
            value_sequences,
            values,
            [r[:n] for r, n in zip(returns, lengths, strict=True)],
            kl,
            [r[:n] for r, n in zip(rewards, lengths, strict=True)],
            gated,
        )

    def _old_logprobs(self, episodes: list[Episode], sequences: list[Sequence]) -> Tensors:
        if self.config.old_logprobs == "trainer":
            return self._each(sequences, self._logprobs)
        return [
            torch.tensor([episode.logprobs[position] for position in sequence.positions])
            for episode, sequence in zip(episodes, sequences, strict=True)
        ]

    def _logprobs(self, batch: TokenBatch, model: PreTrainedModel | None = None) -> torch.Tensor:
        model = model or self.student
        hidden = counted_hidden(backbone_of(model), batch)
        return token_logprobs(hidden, head_of(model), batch.targets, self.config.sampling.temperature)[0]

    def _kl(self, sequences: list[Sequence], old: Tensors, gated: list[bool]) -> Tensors:
        """KL estimates of the gated episodes: the reference never runs on the others."""
        kl = [torch.zeros_like(logprobs) for logprobs in old]
        chosen = [i for i, is_gated in enumerate(gated) if is_gated]
        if not chosen or self.reference is None:
            return kl
        selected = [sequences[i] for i in chosen]
        if self.config.kl_estimator == "full":
            estimates = self._each(selected, self._full_kl)
        else:
            reference = self._each(selected, lambda batch: self._logprobs(batch, self.reference))
            estimates = [
                reward_functions.kl_estimate(old[i], r, self.config.kl_estimator)
                for i, r in zip(chosen, reference, strict=True)
            ]
        for i, estimate in zip(chosen, estimates, strict=True):
            kl[i] = estimate
        return kl

    def _full_kl(self, batch: TokenBatch) -> torch.Tensor:
        assert self.reference is not None
        return distillation_terms(
            counted_hidden(backbone_of(self.student), batch),
            head_of(self.student),
            counted_hidden(backbone_of(self.reference), batch),
            head_of(self.reference),
            batch.targets,
            reverse_kl,
            self.config.sampling.temperature,
        )[1]

    def _each(self, sequences: list[Sequence], function) -> Tensors:  # type: ignore[no-untyped-def]
        """Apply a function of a batch -> [N] in micro-batches; one CPU tensor a sequence, in order."""
        results: dict[int, torch.Tensor] = {}
        for part in micro_batches([len(s.ids) for s in sequences], self.compute.micro_batch_tokens):
            batch = collate([sequences[i] for i in part], self.student.device)
            with autocast(self.compute):
                values = function(batch)
            results.update(zip(part, batch.split(values.float().cpu()), strict=True))
        return [results[i] for i in range(len(sequences))]


def training_metrics(episodes: list[Episode], experience: Experience) -> dict[str, float]:
    """What shows collapse: EM, length, invalid actions, searches, KL in the gate, critic's fit."""
    n = len(episodes)
    gated_kl = [k for k, is_gated in zip(experience.kl, experience.gated, strict=True) if is_gated]
    kl_tokens = torch.cat(gated_kl) if gated_kl else torch.zeros(1)
    return {
        "em": sum(e.correct for e in episodes) / n,
        "reward": sum(float(r.sum()) for r in experience.rewards) / n,
        "kl": float(kl_tokens.mean()),
        "gated": sum(experience.gated) / n,
        "response_tokens": sum(e.model_tokens for e in episodes) / n,
        "searches": sum(len(e.searches) for e in episodes) / n,
        "hit": sum(e.hit for e in episodes) / n,
        "invalid_actions": sum(e.invalid_actions for e in episodes) / n,
        "well_formed": sum(e.well_formed for e in episodes) / n,
        "no_answer": sum(e.ending is not Ending.ANSWERED for e in episodes) / n,
        "explained_variance": explained_variance(torch.cat(experience.values), torch.cat(experience.returns)),
    }
