"""Log-probabilities from hidden states, in chunks: [tokens, vocabulary] is never held as a whole.

Shapes: N tokens, H hidden size, V vocabulary. Every function takes the hidden states that *predict* the
targets, that is, of the positions one before them.
"""

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at one time


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
    pieces = [
        checkpoint(
            _logprobs_and_entropy, hidden[i : i + chunk], head, targets[i : i + chunk], temperature,
            use_reentrant=False,
        )
        for i in range(0, len(targets), chunk)
    ]  # fmt: skip
    if not pieces:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _logprobs_and_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = (torch.nn.functional.linear(hidden, head).float() / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


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
    pieces = [
        checkpoint(
            _cross_entropy_and_kl, hidden[i : i + chunk], head[:shared], teacher_hidden[i : i + chunk],
            teacher_head[:shared], targets[i : i + chunk], use_reentrant=False,
        )
        for i in range(0, len(targets), chunk)
    ]  # fmt: skip
    if not pieces:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _cross_entropy_and_kl(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.nn.functional.linear(hidden, head).float().log_softmax(-1)
    with torch.no_grad():
        teacher = torch.nn.functional.linear(teacher_hidden, teacher_head).float().log_softmax(-1)
    return -student.gather(-1, targets[:, None])[:, 0], forward_kl(teacher, student)


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
