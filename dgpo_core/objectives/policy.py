"""PPO and GRPO on model tokens: advantages, clipped surrogate, value loss (eq. 2; paper, section 4.3).

Shapes: E episodes, T model tokens of the longest one, `mask` [E, T] with 1 on real tokens. Losses are
returned per token, so that the caller sums them with one denominator however the batch is cut.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns, [E, T] each (Schulman et al., 2016).

    An episode ends with its last masked token, after which the value is 0.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        present = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = present * (delta + gamma * lam * following)
        next_value = present * values[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def group_advantages(rewards: torch.Tensor, groups: Sequence[Hashable], eps: float = 1e-6) -> torch.Tensor:
    """GRPO: (r - mean) / (std + eps) within the episodes of one question, [E] (Shao et al., 2024).

    `rewards` [E]; `groups` has each episode's question. The standard deviation is the unbiased one (n - 1),
    as in verl and TRL. An episode alone in its group has nothing to be compared with: 0.
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, group in zip(range(len(rewards)), groups, strict=True):
        members[group].append(i)
    advantages = torch.zeros_like(rewards)
    for chosen in members.values():
        if len(chosen) > 1:
            # in float32 the rounding of a mean of equal rewards is not small beside eps
            own = rewards[chosen].double()
            advantages[chosen] = ((own - own.mean()) / (own.std() + eps)).to(rewards.dtype)
    return advantages


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over masked entries (unbiased variance, as verl's masked_whiten)."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def clipped_surrogate(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss -min(rho A, clip(rho) A) and whether the clip was active (eq. 2)."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def importance_weights(logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi / mu, cap) of each token, flat: truncated importance sampling (Ionides, 2008; Yao et al., 2025).

    `logprobs` are the trainer's before the update, `sampled_logprobs` those that the engine sampled with, mu.
    """
    return (logprobs - sampled_logprobs).exp().clamp(max=cap)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float
) -> torch.Tensor:
    """Per-token max of the squared errors with and without clipping the change of the value."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var[returns - values] / Var[returns] over flat tensors; nan when the returns do not vary."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")
