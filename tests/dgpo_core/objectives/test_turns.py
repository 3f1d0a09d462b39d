"""Losses that go turn by turn, by hand."""

import pytest
import torch

from dgpo_core.objectives.turns import fallen_likelihood, last_turns, sod_weights

TURNS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4])
EPISODES = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])


def test_sod_weighs_a_turn_by_its_distance_beside_that_of_the_first() -> None:
    """Distances of the turns: 1, 4 and 0.5 in the first episode, 3 and 2 in the second; at most 1.2."""
    gaps = torch.tensor([1.0, -1.0, 4.0, -6.0, 2.0, 0.5, 3.0, -2.0])
    reference = torch.linspace(-9, -1, 8)
    found = sod_weights(reference + gaps, reference, TURNS, EPISODES)
    expected = [1.0, 1.0, 0.25, 0.25, 0.25, 1.2, 1.0, 1.2]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_sod_of_a_student_that_agrees() -> None:
    same = torch.linspace(-9, -1, 8)
    assert sod_weights(same, same, TURNS, EPISODES).tolist() == [1.0] * 8


def test_last_turns_of_each_episode() -> None:
    assert last_turns(TURNS, EPISODES).tolist() == [0, 0, 0, 0, 0, 1, 0, 1]


def test_only_falling_turns_of_good_tokens_are_preserved() -> None:
    """Turn 1 falls by 1 as a whole, turn 0 rises; turn 2 falls, and is wrong; turn 3 falls by a rounding."""
    falls = torch.tensor([2.0, -3.0, 3.0, -2.5, 0.5, 1.0, 1e-6, 0.0])
    advantages = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 2.0, 2.0])
    old = torch.linspace(-9, -1, 8)
    policy = (old - falls).requires_grad_()
    found = fallen_likelihood(policy, old, advantages, TURNS)
    assert found.tolist() == pytest.approx([0, 0, 3.0, 0, 0.5, 0, 0, 0], abs=1e-5)
    found.sum().backward()
    assert policy.grad is not None and policy.grad.tolist() == [0, 0, -1, 0, -1, 0, 0, 0]


def test_signs_of_one_turn_are_read_token_by_token() -> None:
    """What has a negative advantage is neither preserved nor counted."""
    old = torch.zeros(3)
    falls, advantages = torch.tensor([1.0, 5.0, -2.0]), torch.tensor([1.0, -1.0, 1.0])
    turns = torch.zeros(3, dtype=torch.long)
    assert not fallen_likelihood(old - falls, old, advantages, turns).any()
