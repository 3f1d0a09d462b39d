"""Log-probabilities from hidden states, in chunks: [tokens, vocabulary] is never held as a whole.

Shapes: N tokens, H hidden size, V vocabulary. Every function takes the hidden states that *predict* the
targets, that is, of the positions one before them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from dgpo_core.objectives.divergences import Divergence, forward_kl

CHUNK = 1024  # tokens whose logits exist at one time

REST = 1e-6  # least mass of the tokens that were not kept

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TopK:
    """The likeliest of the first `vocabulary` ids at N positions: `ids` and `logprobs` (nats), [N, k]."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    vocabulary: int


def token_logprobs(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, float32 [N], nats.

    `hidden` [N, H], `head` [V, H] (the output embedding), `targets` [N] int64. Differentiable; the logits of
    a chunk are computed again in the backward pass.
    """

    def terms(part: slice) -> Pair:
        logprobs = _logprobs(hidden[part], head, temperature)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[part, None])[:, 0], entropy

    return _in_chunks(terms, len(targets), chunk, hidden)


def distillation_terms(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    divergence: Divergence = forward_kl,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the targets and full-vocabulary divergence, float32 [N], nats (eq. 1).

    The two models may pad their vocabularies differently: both distributions are taken over the shared
    prefix of ids, at `temperature`. Differentiable in `hidden` and `head` only.
    """
    shared = min(len(head), len(teacher_head))

    def terms(part: slice) -> Pair:
        student = _logprobs(hidden[part], head[:shared], temperature)
        with torch.no_grad():
            teacher = _logprobs(teacher_hidden[part], teacher_head[:shared], temperature)
        return -student.gather(-1, targets[part, None])[:, 0], divergence(teacher, student)

    return _in_chunks(terms, len(targets), chunk, hidden)


def cached_terms(
    hidden: torch.Tensor,
    head: torch.Tensor,
    top: TopK,
    targets: torch.Tensor,
    divergence: Divergence = forward_kl,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `distillation_terms`, from the teacher's kept distributions over the first `top.vocabulary` ids.

    Both distributions are taken over the kept tokens and one bucket for all others: a KL, Jensen-Shannon or
    skew KL of theirs is at most the full one (data processing inequality); TAID's, whose target blends
    logits, may be on either side. Each is equal to it when the whole vocabulary was kept.
    """

    def terms(part: slice) -> Pair:
        student = _logprobs(hidden[part], head[: top.vocabulary], 1.0)
        cross_entropy = -student.gather(-1, targets[part, None])[:, 0]
        kept = student.gather(-1, top.ids[part])
        if kept.shape[-1] == top.vocabulary:
            return cross_entropy, divergence(top.logprobs[part], kept)
        return cross_entropy, divergence(with_rest(top.logprobs[part]), with_rest(kept))

    return _in_chunks(terms, len(targets), chunk, hidden)


@torch.no_grad()
def top_distributions(
    hidden: torch.Tensor, head: torch.Tensor, vocabulary: int, k: int | None, chunk: int = CHUNK
) -> TopK:
    """The `k` likeliest of the first `vocabulary` ids at each of N positions; None keeps them all."""
    k = min(k or vocabulary, vocabulary)
    pieces = [
        _logprobs(hidden[i : i + chunk], head[:vocabulary], 1.0).topk(k) for i in range(0, len(hidden), chunk)
    ]
    return TopK(
        torch.cat([piece.indices for piece in pieces]),
        torch.cat([piece.values for piece in pieces]),
        vocabulary,
    )


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [..., k] of some tokens, and of all others together in one more: [..., k + 1]."""
    # below 0 by so much that the rest keeps some mass: its logarithm stays finite, and its gradient
    kept = logprobs.logsumexp(-1, keepdim=True).clamp(max=-REST)
    return torch.cat([logprobs, (-kept.expm1()).log()], -1)


def engine_gap(trainer: torch.Tensor, engine: torch.Tensor) -> dict[str, float]:
    """How far two computations of the same log-probabilities, flat, are apart: nats, and the ratio of pi."""
    difference = trainer - engine
    return {
        "engine_gap_mean": difference.abs().mean().item(),
        "engine_gap_max": difference.abs().max().item(),
        "engine_ratio": difference.exp().mean().item(),
    }


def _logprobs(hidden: torch.Tensor, head: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head).float()
    return (logits / temperature).log_softmax(-1)


def _in_chunks(terms: Callable[[slice], Pair], count: int, chunk: int, like: torch.Tensor) -> Pair:
    """`terms` of slices of at most `chunk` tokens, joined; the backward pass computes them again."""
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    pieces = [checkpoint(terms, part, use_reentrant=False) for part in parts]
    if not pieces:
        empty = like.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat([first for first, _ in pieces]), torch.cat([second for _, second in pieces])
