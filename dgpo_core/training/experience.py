"""From episodes to what PPO trains on: log-probabilities, values, rewards and advantages."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives import rewards as reward_functions
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import distillation_terms, engine_gap
from dgpo_core.objectives.policy import explained_variance, gae, group_advantages, whiten
from dgpo_core.protocol.episode import Episode, Owner
from dgpo_core.training.batches import (
    Sequence,
    TokenBatch,
    collate,
    micro_batches,
    model_sequence,
    response_sequence,
)
from dgpo_core.training.engines import FrozenModel, TrainingEngine
from dgpo_core.training.episode_metrics import episode_metrics
from dgpo_core.training.parallel import joined, passes
from dgpo_core.training.token_model import Pair, Terms, policy_terms

Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Experience:
    """One entry an episode; tensors [model tokens of the episode] unless said otherwise.

    `value_sequences`, `values` and `returns` cover the tokens of `gae_scope`: the model's, or all of the
    response; GRPO has none. `kl` is the estimate against the reference, nats, zero where the gate is closed;
    `kl_outside` the same for some of the episodes where it is closed. `reference` are the reference's
    log-probabilities where the gate is open and the KL belongs into the loss (GRPO). `sampled_logprobs` are
    the engine's, where `old_logprobs` are the trainer's and may differ.
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
    kl_outside: Tensors
    reference: list[torch.Tensor | None]
    sampled_logprobs: Tensors | None = None


@dataclass(frozen=True)
class Rolled:
    """A step's episodes with what both algorithms need of them.

    `old` are the log-probabilities of the model tokens under the policy that acted, `sampled` the engine's
    where those are the trainer's; `correct` is boolean, `open_gate` 0 or 1 [episodes]; `inside` the episodes
    whose gate is open, `outside` those of the others on which the KL is measured without being trained on.
    """

    episodes: list[Episode]
    sequences: list[Sequence]
    old: Tensors
    sampled: Tensors | None
    correct: torch.Tensor
    open_gate: torch.Tensor
    inside: list[int]
    outside: list[int]

    @property
    def gated(self) -> list[bool]:
        return [bool(is_open) for is_open in self.open_gate]


@dataclass
class ExperienceMaker:
    actor: TrainingEngine  # of a TokenModel
    reference: FrozenModel | None
    critic: TrainingEngine | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        sequences = [model_sequence(episode) for episode in episodes]
        correct = torch.tensor([episode.correct for episode in episodes])
        open_gate = reward_functions.gate(correct, self.recipe.guidance)
        audited = self.config.audit_episodes if self.reference is not None else 0
        sampled = _sampled_logprobs(episodes, sequences)
        by_trainer = self.config.old_logprobs == "trainer"
        rolled = Rolled(
            episodes,
            sequences,
            self._each(sequences, self._logprobs) if by_trainer else sampled,
            sampled if by_trainer else None,
            correct,
            open_gate,
            inside=[i for i, is_open in enumerate(open_gate) if is_open],
            outside=[i for i, is_open in enumerate(open_gate) if not is_open][:audited],
        )
        return self._relative(rolled) if self.critic is None else self._valued(rolled, self.critic)

    def _relative(self, rolled: Rolled) -> Experience:
        """GRPO: an episode's advantage is how much better it is than others of its question."""
        episodes, sequences, old = rolled.episodes, rolled.sequences, rolled.old
        rewards = rolled.correct.float()
        advantages = group_advantages(rewards, [(e.dataset, e.question_id) for e in episodes])
        references = dict(zip(rolled.inside, self._reference_logprobs(sequences, rolled.inside), strict=True))
        outside = zip(rolled.outside, self._reference_logprobs(sequences, rolled.outside), strict=True)
        zero = torch.zeros_like
        return Experience(
            sequences=sequences,
            old_logprobs=old,
            advantages=[torch.full_like(o, float(a)) for o, a in zip(old, advantages, strict=True)],
            value_sequences=[],
            values=[],
            returns=[],
            kl=[k3(o, references[i]) if i in references else zero(o) for i, o in enumerate(old)],
            rewards=list(rewards[:, None]),
            gated=rolled.gated,
            kl_outside=[k3(old[i], reference) for i, reference in outside],
            reference=[references.get(i) for i in range(len(episodes))],
            sampled_logprobs=rolled.sampled,
        )

    def _valued(self, rolled: Rolled, critic: TrainingEngine) -> Experience:
        """PPO: token rewards with the KL in them, and advantages by the critic's values."""
        episodes, sequences = rolled.episodes, rolled.sequences
        kl = [torch.zeros_like(logprobs) for logprobs in rolled.old]
        for i, estimate in zip(rolled.inside, self._kl(rolled, rolled.inside), strict=True):
            kl[i] = estimate
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(e) for e in episodes] if whole else sequences
        values = self._each(value_sequences, critic)
        # model tokens among the tokens that have a value
        owned = [
            torch.tensor([e.owners[p] == Owner.MODEL for p in s.positions])
            for e, s in zip(episodes, value_sequences, strict=True)
        ]
        scattered = [torch.zeros(len(o)).masked_scatter(o, k) for o, k in zip(owned, kl, strict=True)]
        mask = pad_sequence([torch.ones(len(o)) for o in owned], batch_first=True)
        rewards = reward_functions.token_rewards(
            rolled.correct,
            pad_sequence(scattered, batch_first=True),
            mask,
            rolled.open_gate,
            self.config.beta,
        )
        padded_values = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)
        lengths = [len(o) for o in owned]
        return Experience(
            sequences=sequences,
            old_logprobs=rolled.old,
            advantages=[a[:n][o] for a, n, o in zip(advantages, lengths, owned, strict=True)],
            value_sequences=value_sequences,
            values=values,
            returns=[r[:n] for r, n in zip(returns, lengths, strict=True)],
            kl=kl,
            rewards=[r[:n] for r, n in zip(rewards, lengths, strict=True)],
            gated=rolled.gated,
            kl_outside=self._kl(rolled, rolled.outside),
            reference=[None] * len(episodes),
            sampled_logprobs=rolled.sampled,
        )

    def _logprobs(self, batch: TokenBatch) -> torch.Tensor:
        logprobs: torch.Tensor = self.actor(batch, self._policy(batch))[0]
        return logprobs

    def _policy(self, batch: TokenBatch) -> Terms[Pair]:
        return policy_terms(batch, self.config.sampling.temperature)

    def _kl(self, rolled: Rolled, chosen: list[int]) -> Tensors:
        """KL estimates of the chosen episodes; the reference runs on no others."""
        if not chosen or self.reference is None:
            return []
        if self.config.kl_estimator == "full":
            return self._each([rolled.sequences[i] for i in chosen], self._full_kl)
        references = self._reference_logprobs(rolled.sequences, chosen)
        return [
            reward_functions.kl_estimate(rolled.old[i], reference, self.config.kl_estimator)
            for i, reference in zip(chosen, references, strict=True)
        ]

    def _reference_logprobs(self, sequences: list[Sequence], chosen: list[int]) -> Tensors:
        reference = self.reference
        if reference is None:
            return []
        return self._each(
            [sequences[i] for i in chosen],
            lambda batch: reference(batch, self._policy(batch))[0],
        )

    def _full_kl(self, batch: TokenBatch) -> torch.Tensor:
        reference, temperature = self.reference, self.config.sampling.temperature
        assert reference is not None
        theirs = reference.hidden(batch)

        def terms(hidden: torch.Tensor, head: torch.Tensor) -> Pair:
            return distillation_terms(
                hidden, head, theirs, reference.head, batch.targets, reverse_kl, temperature
            )

        kl: torch.Tensor = self.actor(batch, terms)[1]
        return kl

    def _each(self, sequences: list[Sequence], function) -> Tensors:  # type: ignore[no-untyped-def]
        """Apply a function of a batch -> [N] in micro-batches; one CPU tensor a sequence, in order."""
        parts = list(micro_batches([len(s.ids) for s in sequences], self.compute.micro_batch_tokens))
        own: list[list[torch.Tensor]] = []
        for part, counts in passes(parts, self.actor.lockstep):
            batch = collate([sequences[i] for i in part], self.actor.device)
            values = function(batch)
            if counts:
                own.append(batch.split(values.float().cpu()))
        results: dict[int, torch.Tensor] = {}
        for part, tensors in zip(parts, joined(own), strict=True):
            results.update(zip(part, tensors, strict=True))
        return [results[i] for i in range(len(sequences))]


def _sampled_logprobs(episodes: list[Episode], sequences: list[Sequence]) -> Tensors:
    """What the engine said of the tokens that the model wrote."""
    return [
        torch.tensor([episode.logprobs[position] for position in sequence.positions])
        for episode, sequence in zip(episodes, sequences, strict=True)
    ]


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """GRPO's KL estimate, as in its loss; `k1` there would have no gradient on average."""
    return reward_functions.kl_estimate(logprobs, reference, "k3")


def training_metrics(episodes: list[Episode], experience: Experience) -> dict[str, float]:
    """What shows collapse: the episodes' own metrics, reward, KL inside and outside the gate, ..."""
    inside = [k for k, is_gated in zip(experience.kl, experience.gated, strict=True) if is_gated]
    metrics = episode_metrics(episodes)
    metrics["reward"] = sum(float(r.sum()) for r in experience.rewards) / len(episodes)
    for name, estimates in (("kl_inside", inside), ("kl_outside", experience.kl_outside)):
        if estimates:
            metrics[name] = float(torch.cat(estimates).mean())
    if experience.sampled_logprobs is not None:
        metrics |= engine_gap(torch.cat(experience.old_logprobs), torch.cat(experience.sampled_logprobs))
    if experience.values:
        metrics["explained_variance"] = explained_variance(
            torch.cat(experience.values), torch.cat(experience.returns)
        )
    return metrics
