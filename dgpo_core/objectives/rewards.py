"""Token rewards under a gate: eq. 4 of the paper and its variants (docs/method.md, "Equations").

Shapes: E episodes, T model tokens of the longest one; `mask` [E, T] is 1 on real tokens, a prefix of a row.
"""

from typing import Literal

import torch

Guidance = Literal["selective", "uniform", "none"]
KlEstimator = Literal["k1", "k2", "k3", "abs", "full"]
K3_MAX = 10.0  # of k3's value, as in the released code
K3_MAX_LOG_RATIO = 20.0  # as in verl: beyond it the value is at its bound, and exp() stays finite


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Per-token estimate of KL[policy || reference] from the sampled tokens' log-probabilities, nats.

    k1, k2, k3 are Schulman's estimators ("Approximating KL divergence", 2020); `full` is no estimate from
    samples, and raises ValueError (see `divergences.reverse_kl`). Differentiable, for use in a loss: there,
    on-policy, k1 has an expected gradient of zero, k2 that of KL[policy || reference] and k3 that of
    KL[reference || policy] (where it is not clamped).
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "abs":
        return difference.abs()
    if estimator == "k3":
        log_ratio = (-difference).clamp(-K3_MAX_LOG_RATIO, K3_MAX_LOG_RATIO)
        return (log_ratio.exp() - log_ratio - 1).clamp(max=K3_MAX)
    raise ValueError(f"{estimator!r} needs the whole distributions, not the sampled tokens")


def gate(correct: torch.Tensor, guidance: Guidance) -> torch.Tensor:
    """Which episodes are pulled towards the reference: float [E] of 0 and 1; `correct` bool [E].

    selective: the wrong ones (DGPO, eq. 4). uniform: all. none: no episode.
    """
    if guidance == "selective":
        return (~correct).float()
    return torch.full(correct.shape, float(guidance == "uniform"), device=correct.device)


def token_rewards(
    correct: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, open_gate: torch.Tensor, beta: float
) -> torch.Tensor:
    """Reward of each model token, [E, T] (eqs. 3 and 4): EM on the last one, -beta * KL where gated."""
    rewards = -beta * kl * open_gate[:, None] * mask
    last = mask.sum(1).long() - 1
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last] += correct.float()
    return rewards
