"""Chunked log-probabilities and divergences against torch.distributions and TRL."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from dgpo_core.objectives.divergences import (
    Divergence,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    taid,
)
from dgpo_core.objectives.logprobs import (
    cached_losses,
    distillation_losses,
    engine_gap,
    guided_logprobs,
    token_logprobs,
    top_distributions,
    with_rest,
)
from tests.dgpo_core.objectives.making import made_inside

N, H, V = 11, 6, 17
DIVERGENCES = [
    forward_kl,
    reverse_kl,
    *itertools.starmap(
        made_inside, [(generalized_jsd, 0.3), (skew_kl, 0.1), (skew_reverse_kl, 0.1), (taid, 0.4)]
    ),
]
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Pair = tuple[torch.Tensor, ...]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def parts() -> Parts:
    """Hidden states and heads of a student and a teacher (wider, larger vocabulary), and targets."""
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    return drawn(N, H), drawn(V, H, seed=1), drawn(N, 2 * H, seed=2), drawn(V + 4, 2 * H, seed=4), targets


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_token_logprobs(parts: Parts, temperature: float, chunk: int) -> None:
    hidden, head, *_, targets = parts
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature, chunk)
    expected = Categorical(logits=hidden @ head.T / temperature)
    torch.testing.assert_close(logprobs, expected.log_prob(targets))
    torch.testing.assert_close(entropy, expected.entropy())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_distillation_losses(parts: Parts, temperature: float, chunk: int) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    student = Categorical(logits=hidden @ head.T / temperature)
    teacher = Categorical(logits=teacher_hidden @ teacher_head[:V].T / temperature)
    longer = torch.cat([head, drawn(3, H)])
    for divergence, expected in (
        (forward_kl, kl_divergence(teacher, student)),
        (reverse_kl, kl_divergence(student, teacher)),
    ):
        terms = distillation_losses(*parts, divergence, temperature, chunk)
        torch.testing.assert_close(terms, (-student.log_prob(targets), expected))
        shorter_teacher = distillation_losses(
            hidden, longer, teacher_hidden, teacher_head[:V], targets, divergence, temperature, chunk
        )
        torch.testing.assert_close(shorter_teacher, terms)


def gradients(function: Callable[..., Pair], *leaves: torch.Tensor) -> list[torch.Tensor]:
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    first, second = function(*copies)
    (first.sum() + 0.3 * (second * torch.arange(len(second))).sum()).backward()
    return [copy.grad for copy in copies if copy.grad is not None]


@pytest.mark.parametrize("chunk", [1, 4])
def test_gradients_do_not_depend_on_the_chunk(parts: Parts, chunk: int) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    torch.testing.assert_close(
        gradients(lambda h, w: token_logprobs(h, w, targets, 0.8, chunk), hidden, head),
        gradients(lambda h, w: token_logprobs(h, w, targets, 0.8), hidden, head),
    )
    for divergence in DIVERGENCES:

        def terms(h: torch.Tensor, w: torch.Tensor, size: int, kind: Divergence = divergence) -> Pair:
            return distillation_losses(h, w, teacher_hidden, teacher_head, targets, kind, 0.8, size)

        torch.testing.assert_close(
            gradients(lambda h, w, of=terms: of(h, w, chunk), hidden, head),
            gradients(lambda h, w, of=terms: of(h, w, 100), hidden, head),
        )


@pytest.mark.parametrize("k", [5, V])
@pytest.mark.parametrize("chunk", [1, 4])
def test_kept_distributions_do_not_depend_on_the_chunk(parts: Parts, chunk: int, k: int) -> None:
    """Neither the teacher's, while they are made, nor what the student learns from them."""
    hidden, head, teacher_hidden, teacher_head, targets = parts
    whole = top_distributions(teacher_hidden, teacher_head, V, k, chunk=100)
    cut = top_distributions(teacher_hidden, teacher_head, V, k, chunk)
    assert whole.ids.shape == (N, k)
    assert torch.equal(cut.ids, whole.ids)
    torch.testing.assert_close(cut.logprobs, whole.logprobs)
    for divergence in DIVERGENCES:

        def terms(h: torch.Tensor, w: torch.Tensor, size: int, kind: Divergence = divergence) -> Pair:
            return cached_losses(h, w, whole, targets, kind, size)

        torch.testing.assert_close(terms(hidden, head, chunk), terms(hidden, head, 100))
        if k == V:
            live = distillation_losses(*parts, divergence, chunk=100)
            torch.testing.assert_close(terms(hidden, head, chunk), live)
        torch.testing.assert_close(
            gradients(lambda h, w, of=terms: of(h, w, chunk), hidden, head),
            gradients(lambda h, w, of=terms: of(h, w, 100), hidden, head),
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_finds_the_same_values_and_gradients(parts: Parts, beta: float, temperature: float) -> None:
    """TRL's distillation loss is chunked over the vocabulary too, and its backward is written by hand."""
    hidden, head, teacher_hidden, teacher_head, targets = parts

    def ours(h: torch.Tensor, w: torch.Tensor) -> Pair:
        kind = generalized_jsd(beta)
        terms = distillation_losses(h, w, teacher_hidden, teacher_head, targets, kind, temperature, 4)
        return terms[1], terms[1]

    def trl(h: torch.Tensor, w: torch.Tensor) -> Pair:
        shared = teacher_head[:V]
        found = ChunkedDivergenceFunction.apply(
            h, w, None, teacher_hidden, shared, None, beta, temperature
        )[0]  # fmt: skip
        return found, found

    torch.testing.assert_close(ours(hidden, head), trl(hidden, head), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(ours, hidden, head), gradients(trl, hidden, head), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_do_not_see_each_other(parts: Parts, divergence: Divergence) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    terms = distillation_losses(*parts, divergence, chunk=4)
    permuted = distillation_losses(
        hidden[order], head, teacher_hidden[order], teacher_head, targets[order], divergence, chunk=3
    )
    torch.testing.assert_close(permuted, (terms[0][order], terms[1][order]))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_guided_logprobs(parts: Parts, chunk: int) -> None:
    """The reference is asked at the guided tokens alone, and compared at temperature 1; elsewhere is 0."""
    hidden, head, reference_hidden, wide_head, targets = parts
    guided, reference_head, temperature = torch.arange(N) % 3 != 1, wide_head[:V], 0.6
    logits, reference_logits = hidden @ head.T, reference_hidden @ reference_head.T
    policy, reference = Categorical(logits=logits / temperature), Categorical(logits=reference_logits / 0.6)
    distance = kl_divergence(Categorical(logits=logits), Categorical(logits=reference_logits))
    expected = (
        policy.log_prob(targets), policy.entropy(), distance * guided, reference.log_prob(targets) * guided
    )  # fmt: skip

    def found(h: torch.Tensor, w: torch.Tensor, divergence: Divergence | None) -> Pair:
        reference = reference_hidden[guided].requires_grad_(), reference_head.detach().requires_grad_()
        return guided_logprobs(h, w, targets, temperature, guided, *reference, divergence, chunk)

    torch.testing.assert_close(found(hidden, head, reverse_kl), expected)
    without = found(hidden, head, None)
    torch.testing.assert_close(without, (*expected[:2], torch.zeros(N), expected[3]))
    assert not without[2].requires_grad and not without[3].requires_grad

    def defined(h: torch.Tensor, w: torch.Tensor) -> Pair:
        own = h @ w.T
        kl = kl_divergence(Categorical(logits=own), Categorical(logits=reference_logits)) * guided
        return Categorical(logits=own / temperature).log_prob(targets), kl

    torch.testing.assert_close(
        gradients(lambda h, w: found(h, w, reverse_kl)[::2], hidden, head), gradients(defined, hidden, head)
    )


def test_values_are_single_precision_at_temperature_1_unless_told_otherwise(parts: Parts) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = parts
    student = Categorical(logits=hidden @ head.T)
    teacher = Categorical(logits=teacher_hidden @ teacher_head[:V].T)
    torch.testing.assert_close(
        token_logprobs(hidden, head, targets), (student.log_prob(targets), student.entropy())
    )
    torch.testing.assert_close(distillation_losses(*parts)[1], kl_divergence(teacher, student))
    h, w, teacher_h, teacher_w = (values.bfloat16() for values in parts[:4])
    nobody = torch.zeros(N, dtype=torch.bool)
    found = (
        *token_logprobs(h, w, targets),
        *distillation_losses(h, w, teacher_h, teacher_w, targets),
        *guided_logprobs(h, w, targets, 1.0, nobody, teacher_h[:0], teacher_w[:V], forward_kl),
    )
    assert [values.dtype for values in found] == [torch.float32] * 8


def test_no_tokens(parts: Parts) -> None:
    hidden, head, teacher_hidden, teacher_head, targets = (p[:0] if len(p) == N else p for p in parts)
    reference = hidden.bfloat16(), head.bfloat16()
    found = (
        *token_logprobs(*reference, targets),
        *distillation_losses(hidden, head, teacher_hidden, teacher_head, targets),
        *guided_logprobs(*reference, targets, 1.0, targets.bool(), *reference, forward_kl),
    )
    assert [(values.shape, values.dtype) for values in found] == [((0,), torch.float32)] * 8


def test_engine_gap_by_hand() -> None:
    found = engine_gap(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0]))
    ratio = (math.exp(0.5) + math.exp(-1) + 1) / 3
    assert found == pytest.approx({"engine_gap_mean": 0.5, "engine_gap_max": 1.0, "engine_ratio": ratio})


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1.0, 30.0]))
def test_rest_is_what_the_kept_tokens_leave(seed: int, k: int, scale: float) -> None:
    torch.manual_seed(seed)
    logprobs = (scale * torch.randn(3, 7, dtype=torch.float64)).log_softmax(-1).requires_grad_()
    kept = logprobs[:, :k]
    bucketed = with_rest(kept)
    assert bucketed.shape == (3, k + 1) and bucketed.isfinite().all()
    torch.testing.assert_close(bucketed[:, :k], kept)
    assert bucketed.exp().sum(-1).tolist() == pytest.approx([1.0] * 3, abs=2e-6)
    expected = (1 - kept.exp().sum(-1)).clamp(min=1e-6)
    torch.testing.assert_close(bucketed[:, -1].exp(), expected, rtol=1e-4, atol=1e-7)
    bucketed.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.isfinite().all()
