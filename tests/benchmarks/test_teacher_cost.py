"""The teacher's cost: a step with and without one, at sizes whose parts keep their shares."""

from dataclasses import replace

import pytest

from benchmarks.alternation import Rounds
from benchmarks.dgpo_step import Settings, make_episodes, shape_of
from benchmarks.teacher_cost import ALONE, ROLLOUTS, SHARES, SMALL, measure, planned, report
from dgpo_core.planning.shapes import Architecture


def test_shrunk_models_keep_the_shares_of_the_parts() -> None:
    whole, small = replace(SMALL, shrink=1), SMALL

    def ratios(settings: Settings) -> tuple[float, float, float]:
        student, teacher = (
            Architecture.from_config(shape_of(name, settings)) for name in (SMALL.student, SMALL.teacher)
        )
        return (
            teacher.matrices / student.matrices,
            student.embedding / student.matrices,
            teacher.embedding / teacher.matrices,
        )

    assert ratios(small) == pytest.approx(ratios(whole), rel=0.01)


@pytest.mark.parametrize("share", SHARES)
def test_so_many_episodes_are_wrong_and_all_else_stays(share: float) -> None:
    episodes = make_episodes(replace(SMALL, episodes=20, wrong=share), 100)
    assert sum(not episode.correct for episode in episodes) == round(20 * share)
    right = make_episodes(replace(SMALL, episodes=20, wrong=0.0), 100)
    assert [e.token_ids for e in episodes] == [e.token_ids for e in right]


def test_a_round_has_all_steps() -> None:
    rounds = measure(replace(SMALL, episodes=4, mini_batch=2, shrink=16, scale=0.05), 1)
    assert list(rounds.seconds) == [ALONE, *(f"{share:.0%}" for share in SHARES), ROLLOUTS]
    assert all(seconds > 0 for own in rounds.seconds.values() for seconds in own)


def test_the_ratio_is_that_of_steps_with_their_rollouts() -> None:
    seconds = {ALONE: [4.0, 8.0], ROLLOUTS: [6.0, 12.0]}
    rounds = Rounds("x", seconds | {f"{share:.0%}": [4.0 + share, 8.0 + 2 * share] for share in SHARES})
    assert "| 100% | 1.25 | **1.10** (1.10 to 1.10) |" in report(rounds)
    assert "rollouts are 60%" in report(rounds)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_plans_ratio_grows_with_the_wrong_episodes(engine: str) -> None:
    found = [planned(share, engine) for share in SHARES]
    assert found == sorted(found) and 1 <= found[0] < 1.05 < found[-1] < 2
