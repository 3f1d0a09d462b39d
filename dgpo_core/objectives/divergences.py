"""Divergences between teacher p and student q over a whole vocabulary (docs/method.md, "Divergences").

A `Divergence` takes the teacher's and the student's log-probabilities (float32 or float64) and gives nats.
Gradients reach the student only. A log-probability of -inf is an entry without mass:
it adds nothing to an expectation under its own distribution. Mass where the other distribution has none makes
a divergence infinite, as its definition does.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Logprobs = Float[Tensor, "... V"]
Nats = Float[Tensor, "..."]
Divergence = Callable[[Logprobs, Logprobs], Nats]


def forward_kl(teacher: Logprobs, student: Logprobs) -> Nats:
    """Return KL[p || q]: the student must cover what the teacher does (eq. 1)."""
    return _kl(teacher.detach(), student)


def reverse_kl(teacher: Logprobs, student: Logprobs) -> Nats:
    """Return KL[q || p]: the student must keep to what the teacher does (eq. 4; GKD at beta 1)."""
    return _kl(student, teacher.detach())


def generalized_jsd(beta: float) -> Divergence:
    """Return beta KL[p || m] + (1 - beta) KL[q || m], m = beta p + (1 - beta) q (Agarwal et al., 2024: GKD).

    It vanishes at 0 and at 1; there stand its limits, divided by beta and by 1 - beta: forward KL at 0 and
    reverse KL at 1, as in TRL.
    """
    if beta == 0:
        return forward_kl
    if beta == 1:
        return reverse_kl
    _check_share("beta", beta)

    def divergence(teacher: Logprobs, student: Logprobs) -> Nats:
        teacher = teacher.detach()
        mixture = _log_mixture(teacher, student, beta)
        return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)

    return divergence


def skew_kl(alpha: float) -> Divergence:
    """Return KL[p || alpha p + (1 - alpha) q], at most -log(alpha) (Ko et al., 2024: DistiLLM)."""
    _check_share("alpha", alpha)

    def divergence(teacher: Logprobs, student: Logprobs) -> Nats:
        teacher = teacher.detach()
        return _kl(teacher, _log_mixture(teacher, student, alpha))

    return divergence


def skew_reverse_kl(alpha: float) -> Divergence:
    """Return KL[q || (1 - alpha) p + alpha q], at most -log(alpha); both q have a gradient (DistiLLM)."""
    _check_share("alpha", alpha)

    def divergence(teacher: Logprobs, student: Logprobs) -> Nats:
        return _kl(student, _log_mixture(teacher.detach(), student, 1 - alpha))

    return divergence


def taid(t: float) -> Divergence:
    """Return KL[r || q] with r = softmax((1 - t) stopgrad(z_s) + t z_g) (Shing et al., 2025: TAID).

    The definition is in logits z; log-probabilities differ from them by a constant a row, which the softmax
    drops. The released code takes the cross-entropy to r instead: more by the entropy of r, with the same
    gradient. Where teacher or student has no mass, r has none either, unless t is 1.
    """
    if t == 1:
        return forward_kl
    _check_share("t", t)

    def divergence(teacher: Logprobs, student: Logprobs) -> Nats:
        target = ((1 - t) * student.detach() + t * teacher.detach()).log_softmax(-1)
        return _kl(target, student)

    return divergence


def _kl(first: Logprobs, second: Logprobs) -> Nats:
    """Return KL[first || second]; 0 log 0 is 0."""
    # filled before the product: 0 * -inf would be nan in the value, and 0 * nan in the gradient
    log_ratio = (first - second).masked_fill(first == -math.inf, 0.0)
    return (first.exp() * log_ratio).sum(-1)


def _log_mixture(first: Logprobs, second: Logprobs, share: float) -> Logprobs:
    """Return log(share first + (1 - share) second); any finite value where neither has mass."""
    # logaddexp of two -inf has the gradient nan
    neither = (first == -math.inf) & (second == -math.inf)
    second = second.masked_fill(neither, 0.0)
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not at {value}")
