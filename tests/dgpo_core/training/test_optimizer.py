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
    stepper = optim.Stepper(optimizer, schedule=lambda step: 1.0 / (step + 1), max_grad_norm=1.0)
    for expected in ([3 - 0.6, 4 - 0.8], [3 - 0.9, 4 - 1.2]):
        parameter.grad = torch.tensor([30.0, 40.0])
        assert stepper.step() == pytest.approx(50.0)
        assert parameter.tolist() == pytest.approx(expected)
        assert parameter.grad is None


def test_two_optimisers_are_clipped_together_and_restored() -> None:
    def made(values: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], optim.Stepper]:
        parameters = [torch.nn.Parameter(value.detach().clone()) for value in values]
        optimizers = [torch.optim.SGD([parameters[0]], 0.1, 0.9), torch.optim.Adam([parameters[1]], 0.1)]
        return parameters, optim.Stepper(*optimizers, schedule=optim.cosine(6), max_grad_norm=5.0)

    def run(parameters: list[torch.nn.Parameter], stepper: optim.Stepper, steps: int) -> list[float]:
        norms = []
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = 3 * parameter.detach().clone()
            norms.append(stepper.step())
        return norms

    start = [torch.ones(2, 2), torch.full((2,), 4 / 3)]
    whole, stepper = made(start)
    assert run(whole, stepper, 1) == pytest.approx([math.sqrt(4 * 9 + 2 * 16)])
    assert whole[0][0, 0].item() == pytest.approx(1 - 0.1 * 3 * 5 / math.sqrt(68))
    run(whole, stepper, 4)
    first, early = made(start)
    run(first, early, 3)
    second, late = made([parameter.data for parameter in first])
    late.load_state_dict(early.state_dict())
    assert late.learning_rate == early.learning_rate
    run(second, late, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_changes_nothing(value: float) -> None:
    layer = torch.nn.Linear(2, 2)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    optimizer = optim.adamw(list(layer.parameters()), 0.1, 0.5)
    stepper = optim.Stepper(optimizer, schedule=optim.constant(3), max_grad_norm=1.0)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
    layer.weight.grad[1, 0] = value  # type: ignore[index]
    assert not math.isfinite(stepper.step())
    assert all(torch.equal(parameter, before[name]) for name, parameter in layer.named_parameters())
    assert not optimizer.state and stepper.learning_rate == pytest.approx(0.1 / 3)
    assert layer.weight.grad is None
