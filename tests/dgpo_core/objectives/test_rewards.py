"""KL estimators by enumeration of every outcome and against verl; gate and token rewards."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from verl.trainer.ppo.core_algos import kl_penalty

from dgpo_core.objectives.divergences import forward_kl, reverse_kl
from dgpo_core.objectives.rewards import Guidance, gate, kl_estimate, token_rewards

POLICY = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64)
SAMPLED = ["k1", "k2", "k3", "abs"]
LOGPROB = st.floats(-60, 0)


def expectation(estimator: str, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Of the estimate, over every outcome of the policy."""
    return (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators(estimator: str) -> None:
    expected = kl_divergence(Categorical(POLICY), Categorical(REFERENCE))
    torch.testing.assert_close(expectation(estimator, POLICY, REFERENCE), expected)


@pytest.mark.parametrize("distance", [0.1, 0.01])
def test_bias_of_k2_is_of_third_order(distance: float) -> None:
    """KL and k2's mean share their second-order term: they differ by the cube of the distance."""
    direction = torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)
    reference = (POLICY.log() + distance * direction).softmax(-1)
    bias = expectation("k2", POLICY, reference) - kl_divergence(Categorical(POLICY), Categorical(reference))
    third = (reference.log() - POLICY.log()) ** 3
    torch.testing.assert_close(bias, -(POLICY * third).sum() / 6, rtol=2 * distance, atol=0)


def test_bias_of_abs() -> None:
    """|k1| counts what k1 cancels: above KL by twice the mass where the policy is below the reference."""
    log_ratio = POLICY.log() - REFERENCE.log()
    bias = expectation("abs", POLICY, REFERENCE) - expectation("k1", POLICY, REFERENCE)
    torch.testing.assert_close(bias, -2 * (POLICY * log_ratio.clamp(max=0)).sum())
    assert bias > 0.1


@pytest.mark.parametrize("estimator", SAMPLED)
@given(pairs=st.lists(st.tuples(LOGPROB, LOGPROB), min_size=1, max_size=20))
def test_verl_estimates_the_same(estimator: str, pairs: list[tuple[float, float]]) -> None:
    """k3's clamps included. verl has no full KL: it raises NotImplementedError."""
    policy, reference = torch.tensor(pairs, dtype=torch.float64).T
    torch.testing.assert_close(
        kl_estimate(policy, reference, estimator), kl_penalty(policy, reference, estimator)
    )


def test_k3_is_clamped_and_never_negative() -> None:
    policy = torch.zeros(5, requires_grad=True)
    found = kl_estimate(policy, torch.tensor([-100.0, 100.0, 1.0, 0.0, -5.0]), "k3")
    torch.testing.assert_close(found, torch.tensor([10.0, 10.0, math.e - 2, 0.0, math.exp(-5) + 5 - 1]))
    found.sum().backward()
    assert policy.grad is not None
    # without gradient where it is clamped: not even nan, which exp(100) would give in single precision
    torch.testing.assert_close(policy.grad, torch.tensor([0.0, 0.0, 1 - math.e, 0.0, 1 - math.exp(-5)]))


@pytest.mark.parametrize("estimator", SAMPLED)
def test_estimators_are_differentiable(estimator: str) -> None:
    policy = POLICY.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, REFERENCE.log(), estimator), (policy,))


def expected_gradient(estimator: str, logits: torch.Tensor) -> torch.Tensor:
    """Of the estimate as a loss, on-policy: outcomes are weighted, and their weights get no gradient."""
    logprobs = logits.log_softmax(-1)
    loss = (logprobs.detach().exp() * kl_estimate(logprobs, REFERENCE.log(), estimator)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def test_what_an_estimate_as_a_loss_pulls_towards() -> None:
    """k1: nowhere. k2: down KL[policy || reference], as the full KL. k3: down KL[reference || policy]."""
    logits = POLICY.log().requires_grad_()
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(expected_gradient("k1", logits), zero)
    (full,) = torch.autograd.grad(reverse_kl(REFERENCE.log(), logits.log_softmax(-1)), logits)
    assert full.abs().max() > 0.1
    torch.testing.assert_close(expected_gradient("k2", logits), full)
    torch.testing.assert_close(expected_gradient("k3", logits), POLICY - REFERENCE)


def test_full_kl_is_no_estimate() -> None:
    message = "^'reverse_kl' needs the whole distributions, not the sampled tokens$"
    with pytest.raises(ValueError, match=message):
        kl_estimate(POLICY, REFERENCE, "reverse_kl")


def test_gate() -> None:
    correct, answered = torch.tensor([True, False, False, True]), torch.tensor([True, True, False, False])
    expected: dict[Guidance, list[int]] = {
        "selective": [0, 1, 1, 0],
        "teachable": [0, 1, 0, 0],
        "uniform": [1] * 4,
        "none": [0] * 4,
    }
    for guidance, values in expected.items():
        assert gate(correct, guidance, answered).tolist() == values


@pytest.mark.parametrize("guidance", ["selective", "teachable", "uniform", "none"])
def test_rewards_stay_on_their_device(guidance: Guidance) -> None:
    """Torch's device without data stands for another than the processor."""
    correct, kl = torch.ones(2, dtype=torch.bool, device="meta"), torch.ones(2, 3, device="meta")
    opened = gate(correct, guidance, ~correct)
    assert {opened.device.type, token_rewards(correct, kl, kl, opened, 0.1).device.type} == {"meta"}


def test_token_rewards_by_hand() -> None:
    correct = torch.tensor([True, False, True, False])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 9.0], [6.0, 9.0, 9.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    found = token_rewards(correct, kl, mask, gate(correct, "selective", ~correct), 0.1)
    torch.testing.assert_close(
        found, torch.tensor([[0.0, 0, 1], [-0.4, 0.5, 0], [1, 0, 0], [-0.7, -0.8, -0.9]])
    )
    uniform = token_rewards(correct, kl, mask, gate(correct, "uniform", ~correct), 0.1)
    torch.testing.assert_close(
        uniform, torch.tensor([[-0.1, -0.2, 0.7], [-0.4, 0.5, 0], [0.4, 0, 0], [-0.7, -0.8, -0.9]])
    )
    none = token_rewards(correct, kl, mask, gate(correct, "none", ~correct), 0.1)
    assert none.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]


def policy_gradient(reward: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Of the logits, expected over every outcome, where each outcome has this reward."""
    surprise = (logits.log_softmax(-1) * logits.softmax(-1).detach() * reward.detach()).sum()
    (gradient,) = torch.autograd.grad(surprise, logits)
    return gradient


def test_what_an_estimate_as_a_reward_pulls_towards() -> None:
    """Only k1 is eq. 4. k3: the difference of both KLs' gradients, which cancel where policies are close.
    The full KL is one number for all outcomes: no gradient at all. k2 and abs: something else."""
    logits = POLICY.log().requires_grad_()
    own = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad(reverse_kl(REFERENCE.log(), own), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(forward_kl(REFERENCE.log(), own), logits)
    found = {
        name: policy_gradient(kl_estimate(POLICY.log(), REFERENCE.log(), name), logits) for name in SAMPLED
    }
    torch.testing.assert_close(found["k1"], reverse)
    torch.testing.assert_close(found["k3"], reverse - forward)
    full = reverse_kl(REFERENCE.log(), POLICY.log()).expand(4)
    torch.testing.assert_close(policy_gradient(full, logits), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_rewards_hardly_pull_to_a_near_reference(estimator: str) -> None:
    """Their gradient is of second order in the distance, the KL's of first: a tenth as far, a tenth of it."""
    torch.manual_seed(0)
    logits, direction = torch.randn(2, 50, dtype=torch.float64)
    logits.requires_grad_()
    shares = []
    for distance in (0.1, 0.01):
        reference = (logits.detach() + distance * direction).log_softmax(-1)
        own = logits.log_softmax(-1)
        (reverse,) = torch.autograd.grad(reverse_kl(reference, own), logits)
        found = policy_gradient(kl_estimate(own.detach(), reference, estimator), logits)
        shares.append(float(found.norm() / reverse.norm()))
    assert shares[0] < 0.1
    assert shares[1] == pytest.approx(shares[0] / 10, rel=0.1)
