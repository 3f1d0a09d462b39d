"""Log-probabilities from hidden states, in chunks: [tokens, vocabulary] is never held as a whole.

Shapes: N tokens, H hidden size, V vocabulary. Every function takes the hidden states that *predict* the
targets, that is, of the positions one before them.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

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
        logits = torch.nn.functional.linear(hidden[part], head).float()
        logprobs = (logits / temperature).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[part, None])[:, 0], entropy

    return _in_chunks(terms, len(targets), chunk, hidden)


def distillation_terms(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the targets and full-vocabulary KL[teacher || student], float32 [N], nats (eq. 1).

    The two models may pad their vocabularies differently: both distributions are taken over the shared
    prefix of ids (method.md, section 3). Differentiable in `hidden` and `head` only.
    """
    shared = min(len(head), len(teacher_head))

    def terms(part: slice) -> Pair:
        student = torch.nn.functional.linear(hidden[part], head[:shared]).float().log_softmax(-1)
        with torch.no_grad():
            logits = torch.nn.functional.linear(teacher_hidden[part], teacher_head[:shared])
            teacher = logits.float().log_softmax(-1)
        return -student.gather(-1, targets[part, None])[:, 0], forward_kl(teacher, student)

    return _in_chunks(terms, len(targets), chunk, hidden)


def _in_chunks(terms: Callable[[slice], Pair], count: int, chunk: int, like: torch.Tensor) -> Pair:
    """`terms` of slices of at most `chunk` tokens, joined; the backward pass computes them again."""
    parts = [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
    pieces = [checkpoint(terms, part, use_reentrant=False) for part in parts]
    if not pieces:
        empty = like.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat([first for first, _ in pieces]), torch.cat([second for _, second in pieces])


def forward_kl(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """KL[teacher || student] over the last dimension, nats; the teacher gets no gradient."""
    teacher = teacher_logprobs.detach()
    return (teacher.exp() * (teacher - student_logprobs)).sum(-1)


def reverse_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Full-vocabulary KL[student || teacher] of each token, float32 [N], without gradient (a reward)."""
    shared = min(len(student_head), len(teacher_head))
    pieces = []
    with torch.no_grad():
        for i in range(0, len(student_hidden), chunk):
            student, teacher = (
                (
                    torch.nn.functional.linear(hidden[i : i + chunk], head[:shared]).float() / temperature
                ).log_softmax(-1)
                for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
            )
            pieces.append(forward_kl(student, teacher))
    return torch.cat(pieces) if pieces else student_hidden.new_zeros(0, dtype=torch.float32)
