"""Token rewards under a gate: eq. 4 of the paper and its variants (docs/method.md, "Equations").

`mask` is 1 on real tokens, which are a prefix of each row.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Guidance = Literal["selective", "teachable", "uniform", "none"]
K3_MAX = 10.0  # of k3's value, as in the released code
K3_MAX_LOG_RATIO = 20.0  # as in verl: beyond it the value is at its bound, and exp() stays finite


def kl_estimate(
    logprobs: Float[Tensor, " tokens"], reference: Float[Tensor, " tokens"], estimator: str
) -> Float[Tensor, " tokens"]:
    """Estimate KL[policy || reference] at each token from the sampled tokens' log-probabilities, nats.

    `estimator` is k1, k2, k3 or abs; ValueError for what needs whole distributions (`divergences`).
    k1, k2, k3 are Schulman's estimators ("Approximating KL divergence", 2020). Differentiable, for use in a
    loss: there, on-policy, k1 has an expected gradient of zero, k2 that of KL[policy || reference] and k3
    that of KL[reference || policy] (where it is not clamped).
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


def gate(
    correct: Bool[Tensor, " episodes"], guidance: Guidance, answered: Bool[Tensor, " episodes"]
) -> Float[Tensor, " episodes"]:
    """Return 1 for the episodes that are pulled towards the reference, 0 for the others.

    selective: the wrong ones (DGPO, eq. 4). teachable: of these those whose question the teacher has
    `answered` correctly. uniform: all. none: no episode.
    """
    if guidance == "selective":
        return (~correct).float()
    if guidance == "teachable":
        return (~correct & answered).float()
    return torch.full(correct.shape, float(guidance == "uniform"), device=correct.device)


def token_rewards(
    correct: Bool[Tensor, " episodes"],
    kl: Float[Tensor, "episodes tokens"],
    mask: Float[Tensor, "episodes tokens"],
    open_gate: Float[Tensor, " episodes"],
    beta: float,
) -> Float[Tensor, "episodes tokens"]:
    """Return each token's reward (eqs. 3 and 4): EM on the last one, -beta * KL where the gate is open."""
    rewards = -beta * kl * open_gate[:, None] * mask
    last = mask.sum(1).long() - 1
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last] += correct.float()
    return rewards
