"""Log-probabilities from hidden states, in chunks: [tokens, vocabulary] is never held as a whole.

Shapes: N tokens, H hidden size, V vocabulary. Every function takes the hidden states that *predict* the
targets, that is, of the positions one before them.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from dgpo_core.objectives.divergences import Divergence, forward_kl

CHUNK = 1024  # tokens whose logits exist at one time

Pair = tuple[torch.Tensor, torch.Tensor]


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
    prefix of ids (method.md, section 3), at `temperature`. Differentiable in `hidden` and `head` only.
    """
    shared = min(len(head), len(teacher_head))

    def terms(part: slice) -> Pair:
        student = _logprobs(hidden[part], head[:shared], temperature)
        with torch.no_grad():
            teacher = _logprobs(teacher_hidden[part], teacher_head[:shared], temperature)
        return -student.gather(-1, targets[part, None])[:, 0], divergence(teacher, student)

    return _in_chunks(terms, len(targets), chunk, hidden)


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
