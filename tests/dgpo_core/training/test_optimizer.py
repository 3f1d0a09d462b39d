"""Schedules and the optimiser's step."""

import math

import pytest
import torch

from dgpo_core.training import optimizer as optim


def test_cosine() -> None:
    plain = optim.cosine(10)
    assert [plain(step) for step in range(11)] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(11)]
    )
    assert plain(12) == 0.0
    warm = optim.cosine(10, 4)
    assert [warm(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warm(7) == pytest.approx(0.5)
    assert warm(10) == 0.0


def test_constant() -> None:
    schedule = optim.constant(4)
    assert [schedule(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert optim.constant()(0) == 1.0


def test_weight_decay_is_for_matrices() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = optim.adamw(list(layer.parameters()), 0.1, 0.5)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.5, 1: 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_step_clips_updates_and_clears() -> None:
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = optim.scheduler(optimizer, lambda step: 1.0 / (step + 1))
    for expected in ([3 - 0.6, 4 - 0.8], [3 - 0.9, 4 - 1.2]):
        parameter.grad = torch.tensor([30.0, 40.0])
        assert optim.step([parameter], optimizer, schedule, 1.0) == pytest.approx(50.0)
        assert parameter.tolist() == pytest.approx(expected)
        assert parameter.grad is None
