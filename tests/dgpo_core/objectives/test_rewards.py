"""KL estimators, gate and token rewards."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from dgpo_core.objectives.rewards import KlEstimator, gate, kl_estimate, token_rewards

POLICY = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.1, 0.3, 0.4, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators(estimator: KlEstimator) -> None:
    """The expectation over every outcome is the KL itself."""
    expected = kl_divergence(Categorical(POLICY), Categorical(REFERENCE))
    found = (POLICY * kl_estimate(POLICY.log(), REFERENCE.log(), estimator)).sum()
    torch.testing.assert_close(found, expected)


def test_biased_estimators_by_hand() -> None:
    difference = POLICY.log() - REFERENCE.log()
    for estimator, expected in (("k2", difference**2 / 2), ("abs", difference.abs()), ("k1", difference)):
        torch.testing.assert_close(kl_estimate(POLICY.log(), REFERENCE.log(), estimator), expected)  # type: ignore[arg-type]


def test_k3_is_clamped_and_never_negative() -> None:
    policy, reference = torch.zeros(4), torch.tensor([-100.0, 100.0, 1.0, 0.0])
    found = kl_estimate(policy, reference, "k3")
    # log-ratio clamped to -10: exp(-10) + 10 - 1; value clamped to 10; e - 2; 0
    torch.testing.assert_close(found, torch.tensor([9.0 + torch.tensor(-10.0).exp(), 10.0, torch.e - 2, 0.0]))
    assert (found >= 0).all()


def test_full_kl_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="whole distributions"):
        kl_estimate(POLICY, REFERENCE, "full")


def test_gate() -> None:
    correct = torch.tensor([True, False, False])
    assert gate(correct, "selective").tolist() == [0, 1, 1]
    assert gate(correct, "uniform").tolist() == [1, 1, 1]
    assert gate(correct, "none").tolist() == [0, 0, 0]


def test_token_rewards_by_hand() -> None:
    correct = torch.tensor([True, False, True, False])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 9.0], [6.0, 9.0, 9.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    found = token_rewards(correct, kl, mask, gate(correct, "selective"), 0.1)
    torch.testing.assert_close(
        found, torch.tensor([[0.0, 0, 1], [-0.4, 0.5, 0], [1, 0, 0], [-0.7, -0.8, -0.9]])
    )
    uniform = token_rewards(correct, kl, mask, gate(correct, "uniform"), 0.1)
    torch.testing.assert_close(
        uniform, torch.tensor([[-0.1, -0.2, 0.7], [-0.4, 0.5, 0], [0.4, 0, 0], [-0.7, -0.8, -0.9]])
    )
    none = token_rewards(correct, kl, mask, gate(correct, "none"), 0.1)
    assert none.tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
