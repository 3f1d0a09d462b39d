"""Log-probabilities from hidden states, in chunks: logits [N, V] are never held as a whole.

Shapes: N tokens, H hidden size, V vocabulary, K ids of TopK. Every function takes the hidden states that
*predict* the targets, that is, those of the positions one before them. Results are float32, in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgpo_core.objectives.divergences import Divergence, forward_kl

CHUNK = 1024  # tokens whose logits exist at one time

REST = 1e-6  # least mass of the tokens outside of TopK

PerToken = tuple[Float[Tensor, " N"], ...]  # some values of each token


@dataclass(frozen=True)
class TopK:
    """The likeliest of the first `vocabulary` ids at each of N positions, with their log-probabilities."""

    ids: Int[Tensor, "N K"]
    logprobs: Float[Tensor, "N K"]
    vocabulary: int


def token_logprobs(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> PerToken:
    """Return the log-probability of each target and the entropy of each distribution.

    `head` is the output embedding. Differentiable; the logits of a chunk are computed again in the backward
    pass.
    """

    def values(part: slice) -> PerToken:
        logprobs = _logprobs(hidden[part], head, temperature)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[part, None])[:, 0], entropy

    return _in_chunks(values, len(targets), chunk, hidden)


def guided_logprobs(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    targets: Int[Tensor, " N"],
    temperature: float,
    guided: Bool[Tensor, " N"],
    reference_hidden: Float[Tensor, "M reference_H"],
    reference_head: Float[Tensor, "V reference_H"],
    divergence: Divergence | None,
    chunk: int = CHUNK,
) -> PerToken:
    """Return what `token_logprobs` does, the divergence to a reference, and the reference's log-probability.

    The last two are those of the M tokens that are `guided`, and 0 at the others. `reference_hidden` has the
    reference's states at these M tokens alone. As in a distillation the divergence is taken at temperature 1;
    without one it is 0. Differentiable in `hidden` and `head` only.
    """
    theirs = reference_hidden.new_zeros(len(targets), reference_hidden.shape[-1])
    theirs[guided] = reference_hidden

    def values(part: slice) -> PerToken:
        logits = _logits(hidden[part], head)
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        own, chosen = targets[part, None], guided[part]
        with torch.no_grad():
            reference_logits = _logits(theirs[part][chosen], reference_head)
            scaled = (reference_logits / temperature).log_softmax(-1)
        distance = nothing = torch.zeros_like(entropy)
        if divergence is not None:
            between = divergence(reference_logits.log_softmax(-1), logits[chosen].log_softmax(-1))
            distance = nothing.masked_scatter(chosen, between)
        reference_logprobs = nothing.masked_scatter(chosen, scaled.gather(-1, own[chosen])[:, 0])
        return logprobs.gather(-1, own)[:, 0], entropy, distance, reference_logprobs

    return _in_chunks(values, len(targets), chunk, hidden, width=4)


def distillation_losses(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    teacher_hidden: Float[Tensor, "N teacher_H"],
    teacher_head: Float[Tensor, "teacher_V teacher_H"],
    targets: Int[Tensor, " N"],
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> PerToken:
    """Return the cross-entropy of the targets and the full-vocabulary divergence of each token (eq. 1).

    The two models may pad their vocabularies differently: both distributions are taken over the shared
    prefix of ids, at `temperature`. Differentiable in `hidden` and `head` only.
    """
    shared = min(len(head), len(teacher_head))

    def losses(part: slice) -> PerToken:
        student = _logprobs(hidden[part], head[:shared], temperature)
        with torch.no_grad():
            teacher = _logprobs(teacher_hidden[part], teacher_head[:shared], temperature)
        return -student.gather(-1, targets[part, None])[:, 0], divergence(teacher, student)

    return _in_chunks(losses, len(targets), chunk, hidden)


def cached_losses(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    top: TopK,
    targets: Int[Tensor, " N"],
    divergence: Divergence = forward_kl,
    chunk: int = CHUNK,
) -> PerToken:
    """Return what `distillation_losses` does, from the teacher's stored distributions.

    Both distributions are taken over the stored tokens and one bucket for all others: a KL, Jensen-Shannon
    or skew KL of theirs is at most the full one (data processing inequality); TAID's, whose target blends
    logits, may be on either side. Each is equal to it when the whole vocabulary was stored.
    """

    def losses(part: slice) -> PerToken:
        student = _logprobs(hidden[part], head[: top.vocabulary], 1.0)
        cross_entropy = -student.gather(-1, targets[part, None])[:, 0]
        own = student.gather(-1, top.ids[part])
        if own.shape[-1] == top.vocabulary:
            return cross_entropy, divergence(top.logprobs[part], own)
        return cross_entropy, divergence(with_rest(top.logprobs[part]), with_rest(own))

    return _in_chunks(losses, len(targets), chunk, hidden)


@torch.no_grad()
def top_distributions(
    hidden: Float[Tensor, "N H"],
    head: Float[Tensor, "V H"],
    vocabulary: int,
    k: int,
    chunk: int = CHUNK,
) -> TopK:
    """Return the `k` likeliest of the first `vocabulary` ids at each position."""
    pieces = [_logprobs(part, head[:vocabulary], 1.0).topk(k) for part in hidden.split(chunk)]
    return TopK(torch.cat([p.indices for p in pieces]), torch.cat([p.values for p in pieces]), vocabulary)


def with_rest(logprobs: Float[Tensor, "... K"]) -> Float[Tensor, "... K+1"]:
    """Append the log-probability of all other tokens together."""
    # below 0 by so much that the rest keeps some mass: its logarithm stays finite, and its gradient
    mass = logprobs.logsumexp(-1, keepdim=True).clamp(max=-REST)
    return torch.cat([logprobs, (-mass.expm1()).log()], -1)


def engine_gap(trainer: Float[Tensor, " N"], engine: Float[Tensor, " N"]) -> dict[str, float]:
    """Measure how far two computations of the same log-probabilities are apart: nats, and the ratio of pi."""
    difference = trainer - engine
    return {
        "engine_gap_mean": difference.abs().mean().item(),
        "engine_gap_max": difference.abs().max().item(),
        "engine_ratio": difference.exp().mean().item(),
    }


def _logprobs(
    hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"], temperature: float
) -> Float[Tensor, "N V"]:
    return (_logits(hidden, head) / temperature).log_softmax(-1)


def _logits(hidden: Float[Tensor, "N H"], head: Float[Tensor, "V H"]) -> Float[Tensor, "N V"]:
    return torch.nn.functional.linear(hidden, head).float()


def _in_chunks(
    values: Callable[[slice], PerToken], count: int, chunk: int, like: Tensor, width: int = 2
) -> PerToken:
    """Join `values` of slices of at most `chunk` tokens; the backward pass computes them again."""
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    pieces = [checkpoint(values, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    if not pieces:
        return (like.new_zeros(0, dtype=torch.float32),) * width
    return tuple(torch.cat(parts_) for parts_ in zip(*pieces, strict=True))
