"""Schedules of TAID and DistiLLM: against their recurrences, at their bounds, and continued after a kill."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.training.taid import Interpolation, OffPolicy, ReplayBuffer, Source

LOSSES = st.lists(st.floats(0, 1e6), min_size=1, max_size=40)


def recurrence(losses: list[float], steps: int) -> list[float]:
    """docs/method.md, "Divergences", line by line; the first loss only becomes the previous one."""
    t, m, previous, found = 0.4, 0.0, losses[0], [0.4]
    for step, loss in enumerate(losses[1:], 2):
        change = (previous - loss) / (previous + 1e-15)
        m = 0.99 * m + 0.01 * change
        sigmoid = 1 / (1 + math.exp(-m)) if m > -700 else 0.0
        t = min(1.0, max(0.4 + (1.0 - 0.4) * step / steps, t + 5e-4 * sigmoid * (1 - t)))
        previous = loss
        found.append(t)
    return found


@given(LOSSES)
def test_interpolation_is_its_recurrence(losses: list[float]) -> None:
    schedule, found = Interpolation(100), []
    for step, loss in enumerate(losses, 1):
        schedule.update(loss, step)
        found.append(schedule.t)
    assert found == pytest.approx(recurrence(losses, 100), abs=1e-12)
    assert found == sorted(found)


@given(LOSSES)
def test_interpolation_is_at_least_linear_and_ends_at_its_end(losses: list[float]) -> None:
    steps = len(losses) + 1
    schedule = Interpolation(steps, start=0.2, end=0.9)
    for step, loss in enumerate([1.0, *losses], 1):
        schedule.update(loss, step)
        assert step == 1 or schedule.t >= 0.2 + 0.7 * step / steps - 1e-12
        assert schedule.t <= 0.9
    assert schedule.t == pytest.approx(0.9)


def test_interpolation_is_faster_while_the_loss_falls() -> None:
    falling, rising = Interpolation(10**9, decay=0.5), Interpolation(10**9, decay=0.5)
    for step in range(1, 200):
        falling.update(0.9**step, step)
        rising.update(1.1**step, step)
    assert falling.t > rising.t > 0.4


def test_interpolation_survives_an_exploding_loss() -> None:
    schedule = Interpolation(10)
    for step, loss in enumerate([0.0, 1e30, 1e-30, 1e30], 1):
        schedule.update(loss, step)
    assert schedule.t == pytest.approx(0.4 + 0.6 * 4 / 10)


def test_phi_grows_where_validation_gets_worse() -> None:
    """Against the loss at the last growth: a slow rise counts too, and a fall moves nothing."""
    schedule, found = OffPolicy(100), []
    for loss in [2.0, 1.0, 2.05, 2.11, 2.15, 2.30, 1.0, 2.45]:
        schedule.validate(loss)
        found.append(round(schedule.phi, 10))
    assert found == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3]
    for loss in range(3, 30):
        schedule.validate(loss)
    assert schedule.phi == 1.0


@pytest.mark.parametrize(
    ("draw", "step", "full", "expected"),
    [
        (0.39, 25, True, Source.REPLAY),
        (0.29, 25, True, Source.STUDENT),
        (0.31, 25, True, Source.REPLAY),
        (0.39, 25, False, Source.STUDENT),
        (0.40, 25, True, Source.TEACHER),
        (0.40, 25, False, Source.TEACHER),
        (0.00, 100, True, Source.REPLAY),
        (0.00, 100, False, Source.STUDENT),
    ],
)
def test_source_by_hand(draw: float, step: int, full: bool, expected: Source) -> None:
    schedule = OffPolicy(100)
    schedule.phi = 0.4
    assert schedule.source(draw, step, full) is expected


def test_shares_of_the_sources() -> None:
    """phi of the batches are the student's, and of these 1 - step / total fresh; none at phi 0."""
    schedule = OffPolicy(100)
    draws = [(i + 0.5) / 1000 for i in range(1000)]
    assert {schedule.source(draw, 1, True) for draw in draws} == {Source.TEACHER}
    schedule.phi = 0.5
    found = [schedule.source(draw, 80, True) for draw in draws]
    assert [found.count(source) for source in Source] == [500, 100, 400]


def test_replay_buffer_keeps_the_newest() -> None:
    buffer: ReplayBuffer[int] = ReplayBuffer(5)
    buffer.add([0, 1, 2])
    assert (len(buffer), buffer.full) == (3, False)
    with pytest.raises(ValueError, match="larger"):
        buffer.sample(4, random.Random(0))
    buffer.add([3, 4, 5, 6])
    assert (len(buffer), buffer.full) == (5, True)
    assert sorted(buffer.sample(5, random.Random(0))) == [2, 3, 4, 5, 6]
    assert buffer.sample(3, random.Random(1)) == buffer.sample(3, random.Random(1))
    assert not ReplayBuffer[int]().full


@given(LOSSES, st.integers(0, 40), st.integers(0, 2**32))
def test_continues_exactly_from_its_state(losses: list[float], kill_at: int, seed: int) -> None:
    def fresh() -> tuple[Interpolation, OffPolicy, ReplayBuffer[int]]:
        return Interpolation(50), OffPolicy(50), ReplayBuffer(4)

    whole, killed = fresh(), fresh()
    for step, loss in enumerate(losses, 1):
        if step == kill_at:
            states = [part.state_dict() for part in killed]
            killed = fresh()
            killed[0].load_state_dict(states[0])
            killed[1].load_state_dict(states[1])
            killed[2].load_state_dict(states[2])
        results = []
        for interpolation, off_policy, buffer in (whole, killed):
            rng = random.Random(f"{seed}-{step}")
            interpolation.update(loss, step)
            off_policy.validate(loss)
            source = off_policy.source(rng.random(), step, buffer.full)
            buffer.add([step])
            results.append((interpolation.t, off_policy.phi, source, buffer.sample(1, rng)))
        assert results[0] == results[1]
