"""Policy optimisation on model tokens: advantages, clipped surrogate, value loss (eq. 2; section 4.3).

`mask` is 1 on real tokens, of which the longest episode has as many as the tensors are wide. Losses are
returned per token, so that the caller sums them with one denominator however the batch is cut.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EpisodeTokens = Float[Tensor, "episodes tokens"]
Tokens = Float[Tensor, " tokens"]  # of all episodes, one after the other


def gae(
    rewards: EpisodeTokens, values: EpisodeTokens, mask: EpisodeTokens, gamma: float, lam: float
) -> tuple[EpisodeTokens, EpisodeTokens]:
    """Return generalised advantage estimates and returns (Schulman et al., 2016).

    An episode ends with its last masked token, after which the value is 0. Of values that are all 0, with
    `lam` 1, the estimates are the discounted rewards to come.
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


def group_advantages(
    rewards: Float[Tensor, " episodes"], groups: Sequence[Hashable], eps: float = 1e-6
) -> Float[Tensor, " episodes"]:
    """Return (r - mean) / (std + eps) within the episodes of one question (GRPO; Shao et al., 2024).

    `groups` has each episode's question. The standard deviation is the unbiased one (n - 1), as in verl and
    TRL. An episode alone in its group has nothing to be compared with: 0.
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


def whiten(values: EpisodeTokens, mask: EpisodeTokens) -> EpisodeTokens:
    """Scale masked entries to zero mean and unit variance (unbiased, as verl's masked_whiten)."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / (count - 1).clamp(min=1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def clipped_surrogate(
    logprobs: Tokens, old_logprobs: Tokens, advantages: Tokens, clip: float
) -> tuple[Tokens, Bool[Tensor, " tokens"]]:
    """Return each token's loss -min(rho A, clip(rho) A) and whether the clip was active (eq. 2)."""
    ratio = (logprobs - old_logprobs).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, clipped), clipped > plain


def importance_weights(logprobs: Tokens, sampled_logprobs: Tokens, cap: float) -> Tokens:
    """Return min(pi / mu, cap): truncated importance sampling (Ionides, 2008; Yao et al., 2025).

    `logprobs` are the trainer's before the update, `sampled_logprobs` those that the engine sampled with, mu.
    """
    return (logprobs - sampled_logprobs).exp().clamp(max=cap)


def value_loss(values: Tokens, old_values: Tokens, returns: Tokens, clip: float) -> Tokens:
    """Return the larger of the squared errors with and without clipping the change of the value."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: Tokens, returns: Tokens) -> float:
    """Return 1 - Var[returns - values] / Var[returns]; nan when the returns do not vary."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else float("nan")
