"""What a step of reinforcement learning learns from: log-probabilities, gate, KL, rewards, advantages.

These are the steps (2) to (6) of `dgpo_core/training/reinforce.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dgpo_core.agent.actions import ActionKind, parse_action
from dgpo_core.agent.episode import Decode, Episode, Owner, Turn, nothing_new
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives.divergences import reverse_kl
from dgpo_core.objectives.logprobs import PerToken, distillation_losses, engine_gap
from dgpo_core.objectives.policy import (
    EpisodeTokens,
    explained_variance,
    gae,
    group_advantages,
    whiten,
)
from dgpo_core.objectives.rewards import gate, kl_estimate, token_rewards
from dgpo_core.training.batches import (
    HeadFunction,
    TokenBatch,
    TokenSequence,
    model_sequence,
    policy_function,
    response_sequence,
)
from dgpo_core.training.engines import FrozenModel, TrainingEngine, each_sequence
from dgpo_core.training.episode_sources import Metrics, episode_metrics

Answered = frozenset[tuple[str, str]]  # (data set, question) that the teacher answers correctly
ByEpisode = list[Float[Tensor, " tokens"]]  # one tensor an episode, of the tokens that the model wrote


@dataclass(frozen=True)
class GatedEpisodes:
    """What steps (2) to (4) give, whatever the algorithm.

    `sampled_logprobs` are the engine's, where `old_logprobs` are the trainer's and may differ. `kl`, in nats,
    has the episodes whose gate is open, where the KL is a reward; `kl_outside` has some of the others.
    """

    sequences: list[TokenSequence]
    old_logprobs: ByEpisode
    sampled_logprobs: ByEpisode | None
    correct: Bool[Tensor, " episodes"]
    gate: Float[Tensor, " episodes"]
    kl: dict[int, Float[Tensor, " tokens"]]
    kl_outside: dict[int, Float[Tensor, " tokens"]]


@dataclass(frozen=True)
class Experience(GatedEpisodes):
    """What an update learns from. `rewards` are those of tokens; under GRPO one number an episode."""

    rewards: list[Tensor]
    advantages: ByEpisode


@dataclass(frozen=True)
class PPOExperience(Experience):
    """What an update of actor and critic learns from.

    `value_sequences`, `rewards`, `values` and `returns` cover the tokens of `gae_scope`: those that the model
    wrote, or the whole response.
    """

    value_sequences: list[TokenSequence]
    values: list[Tensor]
    returns: list[Tensor]


@dataclass
class ExperienceMaker:
    """Computes what a step's update learns from: steps (2) to (6)."""

    actor: TrainingEngine  # of a TokenModel
    reference: FrozenModel | None
    critic: TrainingEngine | None  # of a Critic; only PPO has one
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    answered: Answered = frozenset()
    decode: Decode | None = None

    @torch.no_grad()
    def make(self, episodes: list[Episode]) -> Experience:
        """Return the experience of episodes of which each has a token of the model."""
        sequences = [model_sequence(episode) for episode in episodes]

        # (2) Log-probabilities of what the model wrote, under the weights that wrote it (pi_old of eq. 2).
        sampled = _sampled_logprobs(episodes, sequences)
        by_trainer = self.config.old_logprobs == "trainer"
        old = self._each(sequences, self._policy_logprobs) if by_trainer else sampled

        # (3) Gate: which episodes are pulled towards the reference (the second case of eq. 4).
        correct: Bool[Tensor, " episodes"] = torch.tensor([episode.correct for episode in episodes])
        answered = torch.tensor([(e.dataset, e.question_id) in self.answered for e in episodes])
        open_gate: Float[Tensor, " episodes"] = gate(correct, self.recipe.guidance, answered)
        inside = [i for i, is_open in enumerate(open_gate) if is_open]
        outside = [i for i, is_open in enumerate(open_gate) if not is_open][: self.config.audit_episodes]

        # (4) KL[student || reference] at each token of these episodes; the reference runs on no others.
        in_reward = self.recipe.placement == "reward"
        estimator = self.recipe.divergence if in_reward else "k1"
        kl = self._kl(sequences, old, inside, estimator) if in_reward else {}
        kl_outside = self._kl(sequences, old, outside, estimator)

        gated = GatedEpisodes(
            sequences,
            old,
            sampled if by_trainer else None,
            correct,
            open_gate,
            kl,
            kl_outside,
        )
        if self.recipe.algorithm == "grpo":
            return self._grpo(episodes, gated)
        if self.critic is None:
            return self._reinforce(episodes, gated)
        return self._ppo(episodes, gated, self.critic)

    def _ppo(self, episodes: list[Episode], gated: GatedEpisodes, critic: TrainingEngine) -> PPOExperience:
        """Do (5) and (6) of PPO."""
        whole = self.config.gae_scope == "all"
        value_sequences = [response_sequence(episode) for episode in episodes] if whole else gated.sequences
        written: list[Bool[Tensor, " tokens"]] = [  # by the model, among the tokens that have a value
            torch.tensor([episode.owners[position] == Owner.MODEL for position in sequence.positions])
            for episode, sequence in zip(episodes, value_sequences, strict=True)
        ]

        # (5) Rewards.
        rewards, mask = self._token_rewards(episodes, gated, value_sequences, written)

        # (6) Advantages: GAE over the critic's values, whitened over the step's tokens.
        values = self._each(value_sequences, critic)
        padded_values: EpisodeTokens = pad_sequence(values, batch_first=True)
        advantages, returns = gae(rewards, padded_values, mask, self.config.gamma, self.config.lam)
        advantages = whiten(advantages, mask)

        return PPOExperience(
            **vars(gated),
            rewards=_rows(rewards, written),
            advantages=[row[own] for row, own in zip(_rows(advantages, written), written, strict=True)],
            value_sequences=value_sequences,
            values=values,
            returns=_rows(returns, written),
        )

    def _reinforce(self, episodes: list[Episode], gated: GatedEpisodes) -> Experience:
        """Do (5) and (6) of REINFORCE."""
        # (5) Rewards.
        written = [torch.ones(len(old), dtype=torch.bool) for old in gated.old_logprobs]
        rewards, mask = self._token_rewards(episodes, gated, gated.sequences, written)

        # (6) Advantages: the rewards to come minus their mean, whitened over the step's tokens.
        to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, self.config.gamma, lam=1.0)
        advantages = whiten(to_come, mask)

        return Experience(
            **vars(gated), rewards=_rows(rewards, written), advantages=_rows(advantages, written)
        )

    def _grpo(self, episodes: list[Episode], gated: GatedEpisodes) -> Experience:
        """Do (5) and (6) of GRPO."""
        # (5) Rewards (eqs. 3 and 4): EM, and -beta times the sum of the KL where the gate is open.
        rewards: Float[Tensor, " episodes"] = gated.correct.float()
        for i, own in gated.kl.items():
            rewards[i] -= self.config.beta * own.sum()

        # (6) Advantages: how much better an episode is than others of its question, at each of its tokens.
        questions = [(episode.dataset, episode.question_id) for episode in episodes]
        advantages: Float[Tensor, " episodes"] = group_advantages(rewards, questions)

        return Experience(
            **vars(gated),
            rewards=list(rewards[:, None]),
            advantages=[
                torch.full_like(old, float(advantage))
                for old, advantage in zip(gated.old_logprobs, advantages, strict=True)
            ],
        )

    def _token_rewards(
        self,
        episodes: list[Episode],
        gated: GatedEpisodes,
        sequences: list[TokenSequence],
        written: list[Bool[Tensor, " tokens"]],
    ) -> tuple[EpisodeTokens, EpisodeTokens]:
        """Return rewards of the tokens of `sequences`, of which the model wrote some, and a mask of padding.

        EM on the last token (eq. 3), -beta KL on every token where the gate is open (eq. 4), and a penalty on
        the last token of each turn whose search brought nothing new.
        """
        mask: EpisodeTokens = pad_sequence([torch.ones(len(own)) for own in written], batch_first=True)
        kl = [torch.zeros(len(own)) for own in written]
        for i, own in gated.kl.items():
            kl[i].masked_scatter_(written[i], own)
        padded_kl: EpisodeTokens = pad_sequence(kl, batch_first=True)
        rewards = token_rewards(gated.correct, padded_kl, mask, gated.gate, self.config.beta)
        if self.config.repeat_penalty:
            for row, (episode, sequence) in enumerate(zip(episodes, sequences, strict=True)):
                for turn in self._repeating(episode):
                    rewards[row, sequence.positions.index(turn.end - 1)] -= self.config.repeat_penalty
        return rewards, mask

    def _repeating(self, episode: Episode) -> list[Turn]:
        """Return the turns whose searches brought nothing new."""
        assert self.decode is not None
        searched = [
            turn
            for turn, text in zip(episode.turns, episode.turn_texts(self.decode), strict=True)
            if turn.reply_end > turn.end and parse_action(text).kind is ActionKind.SEARCH
        ]
        return [
            turn for turn, repeats in zip(searched, nothing_new(episode.searches), strict=True) if repeats
        ]

    def _kl(
        self, sequences: list[TokenSequence], old: ByEpisode, chosen: list[int], estimator: str
    ) -> dict[int, Float[Tensor, " tokens"]]:
        """Return the KL of the chosen episodes to the reference, if there is one."""
        if not chosen or self.reference is None:
            return {}
        own = [sequences[i] for i in chosen]
        if estimator == "reverse_kl":
            return dict(zip(chosen, self._each(own, self._whole_kl), strict=True))
        references = self._each(own, self._reference_logprobs)
        return {
            i: kl_estimate(old[i], theirs, estimator) for i, theirs in zip(chosen, references, strict=True)
        }

    def _policy_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        logprobs: Tensor = self.actor(batch, self._policy_function(batch))[0]
        return logprobs

    def _reference_logprobs(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        assert self.reference is not None
        return self.reference(batch, self._policy_function(batch))[0]

    def _policy_function(self, batch: TokenBatch) -> HeadFunction:
        return policy_function(batch, self.config.sampling.temperature)

    def _whole_kl(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        """Compute the KL over the whole vocabulary."""
        reference, temperature = self.reference, self.config.sampling.temperature
        assert reference is not None
        theirs = reference.hidden(batch)

        def losses(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"]) -> PerToken:
            return distillation_losses(
                hidden, head, theirs, reference.head, batch.targets, reverse_kl, temperature
            )

        kl: Tensor = self.actor(batch, losses)[1]
        return kl

    def _each(self, sequences: list[TokenSequence], function: Callable[[TokenBatch], Tensor]) -> list[Tensor]:
        return each_sequence(self.actor, sequences, self.compute.micro_batch_tokens, function)


def _rows(values: EpisodeTokens, tokens: ByEpisode) -> ByEpisode:
    """Return each episode's values without the padding; `tokens` has as many as there are."""
    return [row[: len(own)] for row, own in zip(values, tokens, strict=True)]


def _sampled_logprobs(episodes: list[Episode], sequences: list[TokenSequence]) -> ByEpisode:
    """Return the log-probabilities with which the engine sampled what the model wrote."""
    return [
        torch.tensor([episode.logprobs[position] for position in sequence.positions])
        for episode, sequence in zip(episodes, sequences, strict=True)
    ]


def training_metrics(episodes: list[Episode], experience: Experience) -> Metrics:
    """Return what shows collapse: the episodes' own metrics, reward, KL inside and outside the gate, ..."""
    metrics = episode_metrics(episodes)
    metrics["reward"] = sum(float(rewards.sum()) for rewards in experience.rewards) / len(episodes)
    for name, kl in (("kl_inside", experience.kl), ("kl_outside", experience.kl_outside)):
        if kl:
            metrics[name] = float(torch.cat(list(kl.values())).mean())
    if experience.sampled_logprobs is not None:
        metrics |= engine_gap(torch.cat(experience.old_logprobs), torch.cat(experience.sampled_logprobs))
    if isinstance(experience, PPOExperience):
        values, returns = torch.cat(experience.values), torch.cat(experience.returns)
        metrics["explained_variance"] = explained_variance(values, returns)
    return metrics
