"""Divergences against their definitions and TRL, and where mass is missing."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from trl.experimental.gkd.gkd_trainer import GKDTrainer

from dgpo_core.objectives.divergences import (
    Divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
)
from tests.dgpo_core.objectives.making import made_inside

# with its definition on probabilities p of the teacher and q of the student
Definition = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
SHARES = [0.1, 0.5, 0.9]


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The definition, over the support of p."""
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)


def defined_jsd(beta: float) -> Definition:
    return lambda p, q: (
        beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
    )


def defined_taid(t: float) -> Definition:
    def definition(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        blend = p**t * q.detach() ** (1 - t)
        return kl(blend / blend.sum(-1, keepdim=True), q)

    return definition


CASES: list[tuple[Divergence, Definition]] = [
    (forward_kl, kl),
    (reverse_kl, lambda p, q: kl(q, p)),
    *[(made_inside(generalized_jsd, b), defined_jsd(b)) for b in SHARES],
    *[(made_inside(skew_kl, a), lambda p, q, a=a: kl(p, a * p + (1 - a) * q)) for a in SHARES],
    *[(made_inside(skew_reverse_kl, a), lambda p, q, a=a: kl(q, (1 - a) * p + a * q)) for a in SHARES],
    *[(made_inside(taid, t), defined_taid(t)) for t in (0.4, 0.9)],
]
LOGITS = st.lists(st.floats(-15, 15), min_size=2, max_size=6)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@pytest.mark.parametrize(("divergence", "definition"), CASES)
@given(data=st.data())
def test_definitions(divergence: Divergence, definition: Definition, data: st.DataObject) -> None:
    first = data.draw(LOGITS)
    second = data.draw(st.lists(st.floats(-15, 15), min_size=len(first), max_size=len(first)))
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in (first, second))
    found = divergence(p, q)
    torch.testing.assert_close(found, definition(p.exp(), q.exp()), rtol=1e-7, atol=1e-10)
    assert found >= -1e-10
    assert divergence(p, p).abs() < 1e-12
    # neither the vocabulary's order nor single precision matters
    torch.testing.assert_close(divergence(p.flip(-1), q.flip(-1)), found, rtol=1e-9, atol=1e-12)
    single = divergence(p.float(), q.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("divergence", "definition"), CASES)
def test_gradients(divergence: Divergence, definition: Definition) -> None:
    """In the logits, against autograd's of the definition."""
    teacher = drawn(3, 5).log_softmax(-1)
    logits = drawn(3, 5, seed=1).requires_grad_()
    weights = torch.arange(1.0, 4.0, dtype=torch.float64)
    (found,) = torch.autograd.grad((divergence(teacher, logits.log_softmax(-1)) * weights).sum(), logits)
    (expected,) = torch.autograd.grad((definition(teacher.exp(), logits.softmax(-1)) * weights).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("divergence", [divergence for divergence, _ in CASES])
def test_teacher_gets_no_gradient(divergence: Divergence) -> None:
    teacher, student = drawn(3, 5).requires_grad_(), drawn(3, 5, seed=1).requires_grad_()
    divergence(teacher.log_softmax(-1), student.log_softmax(-1)).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_taid_is_the_same_in_logits_and_logprobs() -> None:
    """And the released code's cross-entropy is larger by the target's entropy."""
    z_g, z_s, t = drawn(4, 6), drawn(4, 6, seed=1), 0.7
    target = Categorical(logits=(1 - t) * z_s + t * z_g)
    found = taid(t)(z_g.log_softmax(-1), z_s.log_softmax(-1))
    torch.testing.assert_close(found, kl_divergence(target, Categorical(logits=z_s)))
    cross_entropy = -(target.probs * z_s.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found, cross_entropy - target.entropy())


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl(beta: float, temperature: float) -> None:
    """GKDTrainer's loss: a mean over tokens ("batchmean" is their number when there are labels)."""
    teacher, student = drawn(2, 4, 7), drawn(2, 4, 7, seed=1)
    labels = torch.tensor([[-100, 3, 1, -100], [-100, -100, 2, 5]])

    def ours(z: torch.Tensor) -> torch.Tensor:
        first, second = ((logits / temperature).log_softmax(-1) for logits in (teacher, z))
        return generalized_jsd(beta)(first, second)[labels != -100].mean()

    def trl(z: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = GKDTrainer.generalized_jsd_loss(
            z, teacher, labels=labels, beta=beta, temperature=temperature
        )
        return loss

    logits = student.requires_grad_()
    torch.testing.assert_close(ours(logits), trl(logits))
    torch.testing.assert_close(*(torch.autograd.grad(loss(logits), logits) for loss in (ours, trl)))


def test_limits_of_the_jsd() -> None:
    teacher, student = drawn(5, 6).log_softmax(-1), drawn(5, 6, seed=1).log_softmax(-1)
    tiny = 1e-7
    near_zero, near_one = generalized_jsd(tiny)(teacher, student), generalized_jsd(1 - tiny)(teacher, student)
    torch.testing.assert_close(near_zero / tiny, forward_kl(teacher, student), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(near_one / tiny, reverse_kl(teacher, student), rtol=1e-4, atol=1e-6)
    assert generalized_jsd(0) is forward_kl
    assert generalized_jsd(1) is reverse_kl
    torch.testing.assert_close(generalized_jsd(0.3)(teacher, student), generalized_jsd(0.7)(student, teacher))


def test_limits_of_the_others() -> None:
    teacher, student = drawn(5, 6).log_softmax(-1), drawn(5, 6, seed=1).log_softmax(-1)
    for divergence, limit in ((skew_kl(1e-9), forward_kl), (skew_reverse_kl(1e-9), reverse_kl)):
        torch.testing.assert_close(
            divergence(teacher, student), limit(teacher, student), rtol=1e-5, atol=1e-6
        )
    torch.testing.assert_close(skew_reverse_kl(0.1)(teacher, student), skew_kl(0.1)(student, teacher))
    assert taid(1) is forward_kl
    for divergence in (skew_kl(1 - 1e-9), skew_reverse_kl(1 - 1e-9), taid(1e-9)):
        assert divergence(teacher, student).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("make", "name", "limits"),
    [
        (generalized_jsd, "beta", ()),
        (skew_kl, "alpha", (0.0, 1.0)),
        (skew_reverse_kl, "alpha", (0.0, 1.0)),
        (taid, "t", (0.0,)),
    ],
)
def test_shares_outside_are_refused(
    make: Callable[[float], Divergence], name: str, limits: tuple[float, ...]
) -> None:
    for value in (-0.1, 1.1, *limits):
        with pytest.raises(ValueError, match=f"^{name} must lie between 0 and 1, not at {value}$"):
            make(value)


# teacher and student: mass missing in one, in the other, in both
FULL = [0.4, 0.3, 0.2, 0.1]
MISSING = [
    ([0.5, 0.5, 0.0, 0.0], FULL),
    (FULL, [0.5, 0.5, 0.0, 0.0]),
    ([0.5, 0.5, 0.0, 0.0], [0.7, 0.0, 0.3, 0.0]),
    ([0.5, 0.5, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]),
]


@pytest.mark.parametrize(("divergence", "definition"), CASES)
@pytest.mark.parametrize(("teacher", "student"), MISSING)
def test_missing_mass(
    divergence: Divergence, definition: Definition, teacher: list[float], student: list[float]
) -> None:
    """The definition's value, infinity included; and the gradient that very little mass would give."""
    p, q = torch.tensor(teacher, dtype=torch.float64), torch.tensor(student, dtype=torch.float64)
    logits = q.log().requires_grad_()
    found = divergence(p.log(), logits.log_softmax(-1))
    torch.testing.assert_close(found, definition(p, q))
    if found.isfinite():
        (gradient,) = torch.autograd.grad(found, logits)
        almost = q.log().clamp(min=-1e4).requires_grad_()
        value = divergence(p.log().clamp(min=-1e4), almost.log_softmax(-1))
        (expected,) = torch.autograd.grad(value, almost)
        torch.testing.assert_close(gradient, expected)
        assert not gradient[q == 0].any()


@pytest.mark.parametrize("divergence", [divergence for divergence, _ in CASES])
def test_extreme_logits_in_single_precision(divergence: Divergence) -> None:
    logits = torch.tensor([[0.0, 200.0, -200.0], [0.0, -1e4, 1e4]], requires_grad=True)
    teacher = torch.tensor([[0.0, -200.0, 200.0], [1e4, 0.0, -1e4]]).log_softmax(-1)
    found = divergence(teacher, logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_skew_divergences_are_bounded(alpha: float) -> None:
    teacher, student = MISSING[0][0], [0.0, 0.0, 0.5, 0.5]
    for divergence in (skew_kl(alpha), skew_reverse_kl(alpha)):
        found = divergence(*(torch.tensor(x).log() for x in (teacher, student)))
        assert float(found) == pytest.approx(-math.log(alpha), rel=1e-5)
