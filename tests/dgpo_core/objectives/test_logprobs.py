"""Chunked log-probabilities and divergences against torch.distributions."""

from collections.abc import Callable

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from dgpo_core.objectives.logprobs import distillation_terms, forward_kl, reverse_kl, token_logprobs

N, H, V = 11, 6, 17


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts() -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of a student and a teacher (wider, larger vocabulary), and targets."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return drawn(N, H), drawn(V, H, seed=1), drawn(N, 2 * H, seed=2), drawn(V + 4, 2 * H, seed=4), targets


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_token_logprobs(parts: tuple[torch.Tensor, ...], temperature: float, chunk: int) -> None:
    hidden, head, *_, targets = parts
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature, chunk)
    expected = Categorical(logits=hidden @ head.T / temperature)
    torch.testing.assert_close(logprobs, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_distillation_terms(parts: tuple[torch.Tensor, ...], chunk: int) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    cross_entropy, kl = distillation_terms(hidden, head, teacher_hidden, teacher_head, targets, chunk)
    student = Categorical(logits=hidden @ head.T)
    teacher = Categorical(logits=teacher_hidden @ teacher_head[:V].T)
    torch.testing.assert_close(cross_entropy, -student.log_prob(targets))
    torch.testing.assert_close(kl, kl_divergence(teacher, student))
    smaller = distillation_terms(
        hidden, torch.cat([head, drawn(3, H)]), teacher_hidden, teacher_head[:V], targets
    )
    torch.testing.assert_close(smaller, (cross_entropy, kl))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_reverse_kl(parts: tuple[torch.Tensor, ...], temperature: float, chunk: int) -> None:
    hidden, head, teacher_hidden, teacher_head, _ = parts
    student = Categorical(logits=hidden @ head.T / temperature)
    teacher = Categorical(logits=teacher_hidden @ teacher_head[:V].T / temperature)
    found = reverse_kl(hidden.requires_grad_(), head, teacher_hidden, teacher_head, temperature, chunk)
    torch.testing.assert_close(found, kl_divergence(student, teacher))
    assert not found.requires_grad


def gradients(function: Callable[..., tuple[torch.Tensor, ...]], *leaves: torch.Tensor) -> list[torch.Tensor]:
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first, second = function(*copies)
    (first.sum() + 0.3 * (second * torch.arange(len(second))).sum()).backward()
    return [copy.grad for copy in copies if copy.grad is not None]


def test_gradients_do_not_depend_on_the_chunk(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    for chunk in (1, 4):
        torch.testing.assert_close(
            gradients(lambda h, w: token_logprobs(h, w, targets, 0.8, chunk), hidden, head),  # noqa: B023
            gradients(lambda h, w: token_logprobs(h, w, targets, 0.8), hidden, head),
        )
        torch.testing.assert_close(
            gradients(
                lambda h, w: distillation_terms(h, w, teacher_hidden, teacher_head, targets, chunk),  # noqa: B023
                hidden,
                head,
            ),
            gradients(
                lambda h, w: distillation_terms(h, w, teacher_hidden, teacher_head, targets), hidden, head
            ),
        )


def test_gradients_are_those_of_plain_torch(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts

    def plain(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        student = Categorical(logits=h @ w.T)
        return -student.log_prob(targets), kl_divergence(
            Categorical(logits=teacher_hidden @ teacher_head[:V].T), student
        )

    torch.testing.assert_close(
        gradients(
            lambda h, w: distillation_terms(h, w, teacher_hidden, teacher_head, targets, 3), hidden, head
        ),
        gradients(plain, hidden, head),
        rtol=1e-4,
        atol=1e-5,
    )


def test_teacher_gets_no_gradient(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    for leaf in (teacher_hidden, teacher_head, head):
        leaf.requires_grad_()
    cross_entropy, kl = distillation_terms(hidden, head, teacher_hidden, teacher_head, targets)
    (cross_entropy + kl).sum().backward()
    assert teacher_hidden.grad is None
    assert teacher_head.grad is None
    assert head.grad is not None


def test_forward_kl_gradient() -> None:
    teacher = drawn(3, 5).double().log_softmax(-1)
    student = drawn(3, 5, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: forward_kl(teacher, s.log_softmax(-1)), (student,))
    assert forward_kl(teacher, teacher).abs().max() < 1e-12


def test_no_tokens(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = (p[:0] if len(p) == N else p for p in parts)
    assert token_logprobs(hidden, head, targets)[0].shape == (0,)
    assert distillation_terms(hidden, head, teacher_hidden, teacher_head, targets)[1].shape == (0,)
    assert reverse_kl(hidden, head, teacher_hidden, teacher_head).shape == (0,)
