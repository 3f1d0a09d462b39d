"""The update of reinforcement learning: step (7) of `dgpo_core/training/reinforce.py`."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives.divergences import Divergence, forward_kl, reverse_kl
from dgpo_core.objectives.logprobs import PerToken, guided_logprobs
from dgpo_core.objectives.policy import clipped_surrogate, importance_weights, value_loss
from dgpo_core.objectives.rewards import kl_estimate
from dgpo_core.objectives.turns import fallen_likelihood, sod_weights
from dgpo_core.training.batches import TokenBatch, collate, policy_function
from dgpo_core.training.engines import FrozenModel, TrainingEngine, summed
from dgpo_core.training.episode_sources import Metrics
from dgpo_core.training.experience import Experience, PPOExperience

WHOLE: dict[str, Divergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl}  # over the vocabulary


@dataclass(frozen=True)
class GuidanceLoss:
    """The KL to a reference as a term of the loss, on the tokens of episodes whose gate is open."""

    reference: FrozenModel
    divergence: str
    weight: float
    turns: str = "equal"

    @classmethod
    def of(cls, recipe: Reinforcement, reference: FrozenModel | None) -> "GuidanceLoss | None":
        """Return the term of a recipe, if it places the KL in the loss."""
        if recipe.weight is None or reference is None:
            return None
        return cls(reference, recipe.divergence, recipe.weight, recipe.turns)

    def forward(
        self,
        actor: TrainingEngine,
        batch: TokenBatch,
        read: TokenBatch,
        guided: Bool[Tensor, " N"],
        temperature: float,
    ) -> PerToken:
        """Return log-probabilities, entropies, KL and the reference's log-probabilities, by one pass.

        The last two are 0 at tokens that are not `guided`. `read` are the guided episodes, or, where there is
        none and processes must call the reference equally often, another one.
        """
        theirs = self.reference.hidden(read)[: int(guided.sum())]
        whole = WHOLE.get(self.divergence)

        def function(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"]) -> PerToken:
            return guided_logprobs(
                hidden, head, batch.targets, temperature, guided, theirs, self.reference.head, whole
            )

        logprobs, entropy, kl, reference = actor(batch, function)
        if whole is None:
            kl = kl_estimate(logprobs, reference, self.divergence) * guided
        return logprobs, entropy, kl, reference


@dataclass
class Updater:
    """Updates actor and critic once by every mini-batch of a step's episodes: step (7)."""

    actor: TrainingEngine  # of a TokenModel
    critic: TrainingEngine | None  # of a Critic; only PPO has one
    config: ReinforceConfig
    compute: ComputeConfig
    guidance: GuidanceLoss | None = None

    def update(self, experience: Experience, order: list[int], critic_only: bool = False) -> Metrics:
        """Update by the episodes in this order; return averages of the mini-batches' metrics."""
        parts = mini_batches(order, self.config.mini_batch_size)
        rows = [self._step(experience, part, critic_only) for part in parts]
        found = {key: [row[key] for row in rows if key in row] for row in rows for key in row}
        return {key: sum(values) / len(values) for key, values in found.items()}

    def _step(self, experience: Experience, chosen: list[int], critic_only: bool) -> Metrics:
        metrics: Metrics = {}
        if not critic_only or self.critic is None:
            metrics = self._actor_gradient(experience, chosen)
            metrics["actor_grad_norm"] = self.actor.step()
        if self.critic is not None and isinstance(experience, PPOExperience):
            metrics["value_loss"] = self._critic_gradient(self.critic, experience, chosen)
            metrics["critic_grad_norm"] = self.critic.step()
        return metrics

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> Metrics:
        """Add up the gradient of the policy's loss (eq. 2), an average over the mini-batch's model tokens."""
        config, actor, guidance = self.config, self.actor, self.guidance
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(sequence.positions) for sequence in sequences)
        inside = sum(len(experience.sequences[i].positions) for i in chosen if experience.gate[i])

        def objective(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            episodes = [chosen[i] for i in part]
            old = _flat(experience.old_logprobs, episodes).to(actor.device)
            advantages = _flat(experience.advantages, episodes).to(actor.device)
            gates = experience.gate[episodes].bool()
            guided = gates.repeat_interleave(torch.tensor(batch.counts)).to(actor.device)
            logprobs, entropy, kl, reference = self._forward(experience, episodes, batch, guided)
            losses, clipped = clipped_surrogate(logprobs, old, advantages, config.clip)
            if config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _flat(experience.sampled_logprobs, episodes).to(actor.device)
                losses = losses * importance_weights(old, sampled, config.importance_cap)
            loss = losses.sum() / tokens - config.entropy_weight * entropy.sum() / tokens
            sums = [losses.sum(), entropy.sum(), clipped.sum(), (old - logprobs).sum()]
            if guidance is not None:
                if guidance.turns == "sod":
                    kl = kl * sod_weights(old, reference, batch.turns, batch.rows)
                loss = loss + guidance.weight * kl.sum() / tokens
                sums += [kl.sum(), ((old - reference) * guided).sum() * tokens / max(1, inside)]
            if config.preserve_weight:
                fallen = fallen_likelihood(logprobs, old, advantages, batch.turns)
                loss = loss + config.preserve_weight * fallen.sum() / tokens
                sums += [fallen.sum()]
            return loss, dict(zip(names, (value.item() / tokens for value in sums), strict=True))

        names = ["policy_loss", "entropy", "clip_fraction", "approx_kl"]
        names += ["guidance_loss", "kl_inside"] if guidance is not None else []
        names += ["preserve_loss"] if config.preserve_weight else []
        metrics = summed(actor, sequences, self.compute.micro_batch_tokens, names, objective)
        if not inside:
            metrics.pop("kl_inside", None)
        return metrics

    def _forward(
        self, experience: Experience, episodes: list[int], batch: TokenBatch, guided: Bool[Tensor, " N"]
    ) -> PerToken:
        """Return what `GuidanceLoss.forward` does, with zeros where no token of the micro-batch is guided."""
        actor, temperature = self.actor, self.config.sampling.temperature
        read = [i for i in episodes if experience.gate[i]] or (episodes[:1] if actor.lockstep else [])
        if self.guidance is None or not read:
            logprobs, entropy = actor(batch, policy_function(batch, temperature))
            return logprobs, entropy, torch.zeros_like(logprobs), torch.zeros_like(logprobs)
        gated = collate([experience.sequences[i] for i in read], actor.device)
        return self.guidance.forward(actor, batch, gated, guided, temperature)

    def _critic_gradient(self, critic: TrainingEngine, experience: PPOExperience, chosen: list[int]) -> float:
        """Add up the gradient of the clipped squared error of the values, and return the loss."""
        sequences = [experience.value_sequences[i] for i in chosen]
        tokens = sum(len(sequence.positions) for sequence in sequences)

        def objective(part: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            episodes = [chosen[i] for i in part]
            old = _flat(experience.values, episodes).to(critic.device)
            returns = _flat(experience.returns, episodes).to(critic.device)
            losses = value_loss(critic(batch), old, returns, self.config.value_clip)
            loss = self.config.value_loss_weight * losses.sum() / tokens
            return loss, {"value_loss": loss.item()}

        limit = self.compute.micro_batch_tokens
        return summed(critic, sequences, limit, ["value_loss"], objective)["value_loss"]


def mini_batches(order: list[int], size: int) -> list[list[int]]:
    """Cut into as few parts of at most `size` as possible, of equal lengths to one.

    Where episodes failed, no single left-over episode makes an update of its own.
    """
    count = -(-len(order) // size)
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _flat(values: list[Tensor], episodes: list[int]) -> Float[Tensor, " N"]:
    """Join the values of these episodes' tokens, in the order in which `collate` lays them out."""
    return torch.cat([values[i] for i in episodes])
