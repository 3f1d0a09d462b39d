"""The parts of PPO, GRPO and REINFORCE against plain Python, closed forms, numpy, verl, TRL and torchrl."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.objectives.value.functional import generalized_advantage_estimate
from trl.trainer.utils import nanstd
from verl.trainer.ppo import core_algos

from dgpo_core.objectives.policy import (
    clipped_surrogate,
    explained_variance,
    gae,
    group_advantages,
    importance_weights,
    value_loss,
    whiten,
)

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


FACTORS = st.sampled_from([0.0, 0.5, 0.95, 1.0])


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), FACTORS, FACTORS, st.integers(0, 2**32 - 1))
def test_torchrl_and_verl_estimate_the_same(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    """torchrl takes the next state's value and a flag of the end, verl a mask; verl whitens by itself.

    verl leaves returns behind the mask as they come out, and passes over holes in the mask, where ours ends
    an episode: masks here are prefixes, as in training.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.tensor([[float(t < n) for t in range(width)] for n in lengths])
    rewards, values = (torch.randn(len(lengths), width, generator=generator) for _ in range(2))
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    if mask.sum() > 1:
        theirs, their_returns = core_algos.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
        torch.testing.assert_close(whiten(advantages, mask), theirs * mask, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(returns, their_returns * mask, rtol=1e-4, atol=1e-5)
    following = torch.cat([values[:, 1:], torch.zeros(len(lengths), 1)], 1)
    done = torch.tensor([[t == n - 1 for t in range(width)] for n in lengths])
    theirs, their_returns = generalized_advantage_estimate(
        gamma, lam, *(x[..., None] for x in (values, following, rewards, done))
    )
    torch.testing.assert_close(advantages, theirs[..., 0] * mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returns, their_returns[..., 0] * mask, rtol=1e-4, atol=1e-5)


def test_padding_and_order_change_nothing() -> None:
    order = [2, 0, 3, 1]
    advantages, returns = gae(REWARDS, VALUES, MASK, 0.9, 0.8)
    rewards, values, mask = (torch.nn.functional.pad(x, (0, 3)) for x in (REWARDS, VALUES, MASK))
    wider, wider_returns = gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close((wider[:, :7], wider_returns[:, :7]), (advantages, returns))
    torch.testing.assert_close(
        gae(REWARDS[order], VALUES[order], MASK[order], 0.9, 0.8), (advantages[order], returns[order])
    )
    whitened = whiten(advantages, MASK)
    torch.testing.assert_close(whiten(wider + 9, mask)[:, :7], whitened)
    torch.testing.assert_close(whiten(advantages[order], MASK[order]), whitened[order])


@given(st.lists(st.integers(1, 8), min_size=2, max_size=5), FACTORS, st.integers(0, 2**32 - 1))
def test_verls_reinforce_plus_plus(lengths: list[int], gamma: float, seed: int) -> None:
    generator, width = torch.Generator().manual_seed(seed), max(lengths)
    mask = torch.tensor([[float(t < n) for t in range(width)] for n in lengths])
    rewards = torch.randn(len(lengths), width, generator=generator) * mask
    theirs, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask, SimpleNamespace(gamma=gamma)
    )
    to_come, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    torch.testing.assert_close(to_come, returns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whiten(to_come, mask), theirs, rtol=1e-4, atol=1e-4)


GROUPS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 1.0, -0.3])), max_size=20)


@given(GROUPS, st.randoms(use_true_random=False))
def test_group_advantages(scored: list[tuple[str, float]], rng: random.Random) -> None:
    groups, rewards = [g for g, _ in scored], torch.tensor([r for _, r in scored])
    found = group_advantages(rewards, groups)
    for group in set(groups):
        own = np.array([r for g, r in scored if g == group])
        expected = (own - own.mean()) / (own.std(ddof=1) + 1e-6) if len(own) > 1 else np.zeros(1)
        chosen = [i for i, g in enumerate(groups) if g == group]
        np.testing.assert_allclose(found[chosen].numpy(), expected, rtol=1e-5, atol=1e-6)
    order = list(range(len(scored)))
    rng.shuffle(order)
    torch.testing.assert_close(group_advantages(rewards[order], [groups[i] for i in order]), found[order])


def test_group_advantages_of_verl_and_trl() -> None:
    """Both divide by the unbiased deviation; TRL adds 1e-4 to it.

    An episode alone in its group keeps its reward in verl and becomes nan in TRL (which refuses such groups).
    """
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.25, 0.25])
    groups = ["x", "y", "x", "x", "y", "y", "z", "z"]
    mask = torch.tensor([[1.0, 1.0, float(i % 2)] for i in range(8)])
    token_rewards = torch.zeros(8, 3)
    token_rewards[:, 1] = rewards
    theirs, _ = core_algos.compute_grpo_outcome_advantage(token_rewards, mask, np.array(groups))
    torch.testing.assert_close(group_advantages(rewards, groups)[:, None] * mask, theirs)
    table = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0, 1.0]])
    trl = (table - table.mean(1, keepdim=True)) / (nanstd(table, dim=1, keepdim=True) + 1e-4)
    keys = [question for question in "ab" for _ in range(5)]
    torch.testing.assert_close(group_advantages(table.flatten(), keys, eps=1e-4), trl.flatten())


def test_group_advantages_need_a_group_each() -> None:
    with pytest.raises(ValueError, match="shorter"):
        group_advantages(torch.zeros(3), ["a", "b"])
    # equal rewards, whose mean is rounded in single precision
    assert group_advantages(torch.full((7,), 0.9), ["a"] * 7).abs().max() < 1e-6


def test_whiten_against_numpy() -> None:
    found = whiten(VALUES + 5, MASK).numpy()
    flat = (VALUES + 5)[MASK.bool()].numpy()
    np.testing.assert_allclose(found[MASK.bool().numpy()], (flat - flat.mean()) / flat.std(ddof=1), rtol=1e-4)
    assert not found[~MASK.bool().numpy()].any()
    single = whiten(torch.tensor([[3.0, 9.0]]), torch.tensor([[1.0, 0.0]]))
    assert single.tolist() == [[0.0, 0.0]]
    two = whiten(torch.tensor([[3.0, 9.0], [5.0, 7.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert two[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])


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


def test_importance_weights_by_hand() -> None:
    trainer = torch.tensor([0.5, 0.2, 0.9, 0.3]).log()
    engine = torch.tensor([0.4, 0.4, 0.1, 0.3]).log()
    assert importance_weights(trainer, engine, 2.0).tolist() == pytest.approx([1.25, 0.5, 2.0, 1.0])
    assert importance_weights(torch.tensor([0.0]), torch.tensor([-200.0]), 3.0).tolist() == [3.0]


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 0.2, -1.0, 2.0])
    old = torch.tensor([0.0, 0.0, 0.0, 0.0])
    returns = torch.tensor([1.0, 1.0, 1.0, 0.0])
    # clipped values: 0.5, 0.2, -0.5, 0.5
    assert value_loss(values, old, returns, 0.5).tolist() == pytest.approx([0.25, 0.64, 4.0, 4.0])


@given(st.integers(0, 2**32 - 1))
def test_verl_computes_the_same_losses(seed: int) -> None:
    """Means over the mask. verl bounds the loss at a ratio of 3 where A < 0 (dual clip), and halves the
    value loss: the first is put out of reach, the second is `value_loss_weight` here.
    """
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, advantages, values, old_values, returns = (
        torch.randn(4, 7, generator=generator) for _ in range(6)
    )
    old = logprobs + 0.3 * old
    tokens = MASK.sum()
    losses, clipped = clipped_surrogate(logprobs, old, advantages, 0.2)
    loss, fraction, kl, _ = core_algos.compute_policy_loss(
        old, logprobs, advantages, MASK, cliprange=0.2, clip_ratio_c=1e9
    )
    torch.testing.assert_close((losses * MASK).sum() / tokens, loss)
    torch.testing.assert_close((clipped * MASK).sum() / tokens, fraction)
    torch.testing.assert_close(((old - logprobs) * MASK).sum() / tokens, kl)
    squares = value_loss(values, old_values, returns, 0.5)
    theirs, _ = core_algos.compute_value_loss(values, returns, old_values, MASK, 0.5)
    torch.testing.assert_close(0.5 * (squares * MASK).sum() / tokens, theirs)


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(4)
    first, second, third = (torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(3))
    leaf = first.clone().requires_grad_()
    clipped = clipped_surrogate(first, second, third, 0.2)[1]
    assert 0 < clipped.sum() < 30
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, second, third, 0.2)[0], (leaf,))
    assert 0 < ((first - second).abs() > 0.5).sum() < 30
    assert torch.autograd.gradcheck(lambda x: value_loss(x, second, third, 0.5), (leaf,))


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns.clone(), returns) == 1.0
    assert explained_variance(torch.full((4,), 0.5), returns) == pytest.approx(0.0)
    assert explained_variance(1 - returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
