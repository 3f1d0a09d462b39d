"""PPO's parts against plain Python, closed forms and numpy."""

import math

import numpy as np
import pytest
import torch

from dgpo_core.objectives.policy import clipped_surrogate, explained_variance, gae, value_loss, whiten

LENGTHS = [5, 1, 3, 7]
MASK = torch.tensor([[float(t < n) for t in range(7)] for n in LENGTHS])
GENERATOR = torch.Generator().manual_seed(0)
REWARDS, VALUES = (torch.randn(4, 7, generator=GENERATOR) * MASK for _ in range(2))


def reference_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: sums of discounted temporal differences, without recursion."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_is_its_definition(gamma: float, lam: float) -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma, lam)
    for row, length in enumerate(LENGTHS):
        rewards, values = REWARDS[row, :length].tolist(), VALUES[row, :length].tolist()
        expected = reference_gae(rewards, values, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        sums = [a + v for a, v in zip(expected, values, strict=True)]
        assert returns[row, :length].tolist() == pytest.approx(sums, abs=1e-5)
    assert not (advantages * (1 - MASK)).any()
    assert not (returns * (1 - MASK)).any()


def test_gae_without_discount_is_reward_to_go_minus_value() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, 1.0, 1.0)
    to_go = REWARDS.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - VALUES) * MASK)
    torch.testing.assert_close(returns, to_go * MASK)


def test_gae_ignores_what_is_behind_the_mask() -> None:
    noise = torch.randn(4, 7, generator=GENERATOR) * (1 - MASK)
    torch.testing.assert_close(
        gae(REWARDS + noise, VALUES + noise, MASK, 0.9, 0.8), gae(REWARDS, VALUES, MASK, 0.9, 0.8)
    )


def test_whiten_against_numpy() -> None:
    found = whiten(VALUES + 5, MASK).numpy()
    flat = (VALUES + 5)[MASK.bool()].numpy()
    np.testing.assert_allclose(found[MASK.bool().numpy()], (flat - flat.mean()) / flat.std(ddof=1), rtol=1e-4)
    assert not found[~MASK.bool().numpy()].any()
    single = whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[1.0, 0.0]]))
    assert single.tolist() == [[0.0, 0.0]]


def test_clipped_surrogate_by_hand() -> None:
    """(ratio, advantage) -> loss: clipping never makes the objective better than the plain one."""
    cases = [
        (1.5, 2.0, -2.4, True),
        (1.1, 2.0, -2.2, False),
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),
        (1.5, -2.0, 3.0, False),
        (0.9, -2.0, 1.8, False),
    ]
    ratios, advantages, losses, active = map(list, zip(*cases, strict=True))
    old = torch.full((6,), -1.3)
    found, clipped = clipped_surrogate(old + torch.tensor(ratios).log(), old, torch.tensor(advantages), 0.2)
    assert found.tolist() == pytest.approx(losses, abs=1e-6)
    assert clipped.tolist() == active


def test_clipped_tokens_get_no_gradient() -> None:
    logprobs = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
    losses, _ = clipped_surrogate(logprobs, torch.zeros(3), torch.tensor([1.0, 1.0, 1.0]), 0.2)
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0, -math.exp(-0.5)])


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 0.2, -1.0, 2.0])
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    returns = torch.tensor([1.0, 1.0, 1.0, 0.0])
    # clipped values: 0.5, 0.2, -0.5, 0.5
    assert value_loss(values, old, returns, 0.5).tolist() == pytest.approx([0.25, 0.64, 4.0, 4.0])


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns.clone(), returns) == 1.0
    assert explained_variance(torch.full((4,), 0.5), returns) == pytest.approx(0.0)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
