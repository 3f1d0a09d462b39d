"""Budgets of trainings, added along the recipes that they start from."""

from dataclasses import replace

import pytest

from dgpo_core.reporting.budget import EPISODES, MINUTES, Budgets, control, figures, gap_text
from dgpo_core.reporting.curves import Curve

PARAMS = {
    "recipes": {
        "distill": {"kd": {"start": "student"}, "kd_long": {"start": "student"}},
        "reinforce": {"dgpo": {"start": "kd"}, "further": {"start": "dgpo"}},
    }
}
KD = Curve(
    "distill",
    "kd",
    {
        "episodes": [(1, 16.0), (2, 16.0), (3, 5.0)],
        "processor_seconds": [(1, 30.0), (2, 60.0), (3, 90.0)],
        "dev_em": [(3, 0.4)],
    },
)
DGPO = Curve(
    "reinforce",
    "dgpo",
    {
        "episodes": [(1, 128.0), (2, 128.0)],
        "processor_seconds": [(1, 60.0), (2, 180.0)],
        "dev_em": [(1, 0.5), (2, 0.6)],
    },
)


def test_a_recipe_has_the_budget_of_its_start_spent_too() -> None:
    budgets = Budgets.of([KD, DGPO], PARAMS)
    assert budgets.total("kd", EPISODES) == 37 and budgets.total("dgpo", EPISODES) == 37 + 256
    assert budgets.total("dgpo", MINUTES) == 1.5 + 3.0
    assert budgets.looks("dgpo", EPISODES) == [(37 + 128, 0.5), (37 + 256, 0.6)]
    assert budgets.looks("dgpo", MINUTES) == [(2.5, 0.5), (4.5, 0.6)]
    [episodes, minutes] = figures([budgets], ["kd", "dgpo"]).values()
    assert [trace["x"] for trace in episodes["traces"]] == [[37], [165, 293]]
    assert [trace["x"] for trace in minutes["traces"]] == [[1.5], [2.5, 4.5]]


def test_what_a_start_has_cost_is_not_guessed() -> None:
    """Runs of before, without episodes and times, and starts that left no curve."""
    old = Curve("distill", "kd", {"dev_em": [(3, 0.4)]})
    for budgets in (Budgets.of([old, DGPO], PARAMS), Budgets.of([DGPO], PARAMS), Budgets.of([KD, DGPO], {})):
        assert budgets.total("dgpo", EPISODES) is None
        assert not budgets.looks("dgpo", MINUTES)
    assert figures([Budgets.of([old], PARAMS)], ["kd", "further"]) == {}


def test_seeds_are_averaged_look_by_look_as_far_as_all_of_them_go() -> None:
    longer = replace(DGPO, columns={"episodes": [(1, 100.0), (2, 100.0)], "dev_em": [(1, 0.7), (2, 0.9)]})
    shorter = replace(DGPO, columns={"episodes": [(1, 200.0)], "dev_em": [(1, 0.3)]})
    runs = [Budgets.of([KD, own], PARAMS) for own in (longer, shorter)]
    [episodes, _] = figures(runs, ["kd", "dgpo"]).values()
    assert [(trace["x"], trace["y"]) for trace in episodes["traces"]] == [([37], [0.4]), ([187], [0.5])]


def test_the_control_is_named_with_its_cost() -> None:
    long = Curve("distill", "kd_long", {"episodes": [(1, 150.0), (2, 150.0)]})
    entry = {"mean": -0.05, "ci95": [-0.08, -0.02], "n": 100}
    said, numbers = control(Budgets.of([KD, DGPO, long], PARAMS), {"dgpo-kd_long": entry})
    assert said == "DGPO is behind KD, longer by 0.050 EM"
    assert numbers.endswith("on 100 questions. KD, longer has cost 300 episodes.")


@pytest.mark.parametrize(
    ("mean", "said"), [(0.11, "More than 0.1 better"), (0.1, "No model is more than"), (None, "No model is")]
)
def test_only_a_wide_gap_is_called_learnt_by_heart(mean: float | None, said: str) -> None:
    assert gap_text({"kd": {"gap": {"mean": mean, "ci95": [None, None]}}}).startswith(said)
