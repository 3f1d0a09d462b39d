"""One pass of PPO updates over a step's experience."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives.policy import clipped_surrogate, importance_weights, value_loss
from dgpo_core.training.batches import collate, micro_batches
from dgpo_core.training.engines import TrainingEngine
from dgpo_core.training.experience import Experience, k3
from dgpo_core.training.parallel import added, passes
from dgpo_core.training.token_model import policy_terms


@dataclass
class Updater:
    actor: TrainingEngine  # of a TokenModel
    critic: TrainingEngine | None
    config: ReinforceConfig
    compute: ComputeConfig

    def update(self, experience: Experience, order: list[int]) -> dict[str, float]:
        """One actor and, with a critic, one critic update a mini-batch; metrics are averages over them."""
        parts = mini_batches(order, self.config.mini_batch_size)
        rows = [self._mini_batch(experience, part) for part in parts]
        return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}

    def _mini_batch(self, experience: Experience, chosen: list[int]) -> dict[str, float]:
        metrics = self._actor_gradient(experience, chosen)
        metrics["actor_grad_norm"] = self.actor.step()
        if self.critic is not None:
            metrics["value_loss"] = self._critic_gradient(self.critic, experience, chosen)
            metrics["critic_grad_norm"] = self.critic.step()
        return metrics

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> dict[str, float]:
        """Loss sums over model tokens, with the mini-batch's token count as the one denominator."""
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        totals = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
        lengths = [len(s.ids) for s in sequences]
        parts = micro_batches(lengths, self.compute.micro_batch_tokens)
        for part, counts in passes(parts, self.actor.lockstep):
            batch = collate([sequences[i] for i in part], self.actor.device)
            old = _stream(experience.old_logprobs, chosen, part).to(self.actor.device)
            advantages = _stream(experience.advantages, chosen, part).to(self.actor.device)
            logprobs, entropy = self.actor(batch, policy_terms(batch, self.config.sampling.temperature))
            losses, clipped = clipped_surrogate(logprobs, old, advantages, self.config.clip)
            if self.config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _stream(experience.sampled_logprobs, chosen, part).to(self.actor.device)
                losses = losses * importance_weights(old, sampled, self.config.importance_cap)
            loss = losses.sum() / tokens - self.config.entropy_weight * entropy.sum() / tokens
            guidance = self._guidance(experience, [chosen[i] for i in part], logprobs)
            loss = loss + self.config.beta * guidance / tokens
            self.actor.backward(loss if counts else 0 * loss)
            if not counts:
                continue
            totals["policy_loss"] += losses.sum().item() / tokens
            totals["entropy"] += entropy.sum().item() / tokens
            totals["clip_fraction"] += clipped.sum().item() / tokens
            totals["approx_kl"] += (old - logprobs).sum().item() / tokens
        return added(totals)

    def _guidance(self, experience: Experience, part: list[int], logprobs: torch.Tensor) -> torch.Tensor:
        """Sum of the KL estimates that belong into the loss: of gated episodes, under GRPO."""
        total = logprobs.new_zeros(())
        own = logprobs.split([len(experience.old_logprobs[i]) for i in part])
        for i, policy in zip(part, own, strict=True):
            reference = experience.reference[i]
            if reference is not None:
                total = total + k3(policy, reference.to(policy.device)).sum()
        return total

    def _critic_gradient(self, critic: TrainingEngine, experience: Experience, chosen: list[int]) -> float:
        sequences = [experience.value_sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        total = 0.0
        lengths = [len(s.ids) for s in sequences]
        parts = micro_batches(lengths, self.compute.micro_batch_tokens)
        for part, counts in passes(parts, critic.lockstep):
            batch = collate([sequences[i] for i in part], critic.device)
            old = _stream(experience.values, chosen, part).to(critic.device)
            returns = _stream(experience.returns, chosen, part).to(critic.device)
            losses = value_loss(critic(batch), old, returns, self.config.value_clip)
            loss = self.config.value_loss_weight * losses.sum() / tokens
            critic.backward(loss if counts else 0 * loss)
            total += loss.item() if counts else 0.0
        return added({"value_loss": total})["value_loss"]


def mini_batches(order: list[int], size: int) -> list[list[int]]:
    """As few parts of at most `size` as possible, of equal lengths to one: where episodes failed, no single
    left-over episode makes an update of its own."""
    count = -(-len(order) // size)
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


def _stream(tensors: list[torch.Tensor], chosen: list[int], part: list[int]) -> torch.Tensor:
    """Values of a micro-batch's tokens, in the order in which `collate` lays them out."""
    return torch.cat([tensors[chosen[i]] for i in part])
