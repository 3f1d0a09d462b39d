"""What counts as a collapse."""

from dataclasses import replace
from pathlib import Path

import pytest

from dgpo_core.agent.episode import Episode
from dgpo_core.reporting.curves import Curve, read_curves
from dgpo_core.reporting.reproduction.claims import Training, assess
from dgpo_core.training.episode_sources import episode_metrics
from tasks.stages.outputs import write_curves
from tests.dgpo_core.making import random_episode

RISE = [0.1 + 0.01 * step for step in range(40)]  # to 0.49
LOSS = [0.4 - 0.05 * step for step in range(8)] + [0.02] * 12


def assessed(em: list[float], **columns: list[float]) -> Training:
    points = {"em": em, **columns}
    steps = {name: [(float(s), v) for s, v in enumerate(own, 1)] for name, own in points.items()}
    found = assess(Curve("reinforce", "ppo", steps))
    assert found is not None
    return found


def test_stable_up_to_its_last_step() -> None:
    found = assessed(RISE, invalid_actions=[2.0] * 40)
    assert (found.state, found.step, found.steps, found.drift) == ("stable", None, 40, "")
    assert found.best == pytest.approx(0.485)  # the last of a moving average
    assert found.converged == 35  # 0.44, the first value of at least 0.9 of it


@pytest.mark.parametrize(
    ("columns", "state"),
    [
        ({"invalid_actions": [0.1] * 40 + [1.5] * 20}, "collapsed"),
        ({"response_tokens": [80.0] * 40 + [400.0] * 20}, "collapsed"),
        ({"response_tokens": [80.0] * 40 + [20.0] * 20}, "collapsed"),
        ({"response_tokens": [80.0] * 40 + [120.0] * 20, "invalid_actions": [0.1] * 60}, "fell"),
        ({}, "fell"),
    ],
)
def test_collapse_is_a_loss_with_a_drift(columns: dict[str, list[float]], state: str) -> None:
    found = assessed(RISE + LOSS, **columns)
    assert found.state == state
    assert found.step in (44, 45)  # 0.25 is the first value under half of 0.49, up to the smoothing
    assert bool(found.drift) == (state == "collapsed")


def test_on_policy_distillation_can_collapse(tmp_path: Path) -> None:
    """With the columns that its trainer writes: those of its episodes, the losses and the looks."""
    rows = [
        {"step": step, "loss": 0.1, "ce": 0.5, "divergence": 0.1, "learning_rate": 1e-4, "grad_norm": 1.0}
        | episode_metrics(sampled(em, 0 if step <= len(RISE) else 2))
        | {"entropy": 0.5}
        for step, em in enumerate(RISE + LOSS, 1)
    ]
    write_curves(tmp_path / "distill-gkd.csv", [*rows[:-1], rows[-1] | {"dev_em": 0.0}])
    (curve,) = read_curves(tmp_path)
    found = assess(curve)
    assert found is not None
    assert (found.state, curve.recipe) == ("collapsed", "gkd")
    assert "invalid actions 0.00 → 2.00" in found.drift


def sampled(em: float, invalid_actions: int) -> list[Episode]:
    return [
        replace(random_episode(i, correct=i < round(100 * em)), invalid_actions=invalid_actions)
        for i in range(100)
    ]


def test_dip_that_recovers_is_no_collapse() -> None:
    found = assessed(RISE + [0.05] * 6 + [0.45] * 10, invalid_actions=[0.1] * 40 + [2.0] * 16)
    assert found.state == "stable"


def test_what_never_rose_cannot_collapse() -> None:
    found = assessed([0.02, 0.04, 0.0] * 10, invalid_actions=[3.0] * 30)
    assert (found.state, found.step, found.converged) == ("never learned", None, None)


def test_held_out_em_where_the_sampled_is_missing_and_nothing_without_any() -> None:
    held_out = Curve("", "gkd", {"dev_em": [(8.0, 0.2), (16.0, 0.3), (24.0, 0.3)]})
    found = assess(held_out)
    assert found is not None
    assert (found.state, found.steps) == ("stable", 24)
    assert assess(Curve("", "gkd", {"loss": [(1.0, 2.0)]})) is None
