"""One pass of PPO updates over a step's experience."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.objectives.logprobs import token_logprobs
from dgpo_core.objectives.policy import clipped_surrogate, importance_weights, value_loss
from dgpo_core.training.batches import backbone_of, collate, counted_hidden, head_of, micro_batches
from dgpo_core.training.compute import autocast
from dgpo_core.training.critic import Critic
from dgpo_core.training.experience import Experience, k3
from dgpo_core.training.optimizer import Stepper
from dgpo_core.training.parallel import add_gradients, added, share


@dataclass
class Updater:
    student: PreTrainedModel
    critic: Critic | None
    actor: Stepper
    critic_stepper: Stepper | None
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
        if self.critic is not None and self.critic_stepper is not None:
            metrics["value_loss"] = self._critic_gradient(self.critic, experience, chosen)
            metrics["critic_grad_norm"] = self.critic_stepper.step()
        return metrics

    def _actor_gradient(self, experience: Experience, chosen: list[int]) -> dict[str, float]:
        """Loss sums over model tokens, with the mini-batch's token count as the one denominator."""
        sequences = [experience.sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        totals = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "approx_kl"), 0.0)
        lengths = [len(s.ids) for s in sequences]
        for part in share(micro_batches(lengths, self.compute.micro_batch_tokens)):
            batch = collate([sequences[i] for i in part], self.student.device)
            old = _stream(experience.old_logprobs, chosen, part).to(self.student.device)
            advantages = _stream(experience.advantages, chosen, part).to(self.student.device)
            with autocast(self.compute):
                hidden = counted_hidden(backbone_of(self.student), batch)
                logprobs, entropy = token_logprobs(
                    hidden, head_of(self.student), batch.targets, self.config.sampling.temperature
                )
            losses, clipped = clipped_surrogate(logprobs, old, advantages, self.config.clip)
            if self.config.importance_cap is not None and experience.sampled_logprobs is not None:
                sampled = _stream(experience.sampled_logprobs, chosen, part).to(self.student.device)
                losses = losses * importance_weights(old, sampled, self.config.importance_cap)
            loss = losses.sum() / tokens - self.config.entropy_weight * entropy.sum() / tokens
            guidance = self._guidance(experience, [chosen[i] for i in part], logprobs)
            loss = loss + self.config.beta * guidance / tokens
            loss.backward()
            totals["policy_loss"] += losses.sum().item() / tokens
            totals["entropy"] += entropy.sum().item() / tokens
            totals["clip_fraction"] += clipped.sum().item() / tokens
            totals["approx_kl"] += (old - logprobs).sum().item() / tokens
        add_gradients(self.student)
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

    def _critic_gradient(self, critic: Critic, experience: Experience, chosen: list[int]) -> float:
        sequences = [experience.value_sequences[i] for i in chosen]
        tokens = sum(len(s.positions) for s in sequences)
        total = 0.0
        lengths = [len(s.ids) for s in sequences]
        for part in share(micro_batches(lengths, self.compute.micro_batch_tokens)):
            batch = collate([sequences[i] for i in part], self.student.device)
            old = _stream(experience.values, chosen, part).to(self.student.device)
            returns = _stream(experience.returns, chosen, part).to(self.student.device)
            with autocast(self.compute):
                values = critic(batch)
            losses = value_loss(values, old, returns, self.config.value_clip)
            loss = self.config.value_loss_weight * losses.sum() / tokens
            loss.backward()
            total += loss.item()
        add_gradients(critic)
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
