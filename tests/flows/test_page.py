"""What the page of a run says while it runs and in the end; figures by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgpo_core.errors import UserError
from tasks.project.graph import Stage
from tests.tasks.miniature import change_params, make_project

STAGES = {
    "data": Stage(name="data"),
    "distill@kd": Stage(name="distill@kd", upstream=("data",), gpus=2),
    "evaluate@kd": Stage(name="evaluate@kd", upstream=("distill@kd",)),
    "evaluate@student": Stage(name="evaluate@student", upstream=("data",)),
}
BEFORE = {"data": 60.0, "distill@kd": 600.0, "evaluate@kd": 120.0, "evaluate@student": 300.0}


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    import flows.page  # noqa: F401

    clock = Clock()
    monkeypatch.setattr("flows.page.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def page_of(**arguments: Any) -> Any:
    from flows.page import RunPage

    return RunPage(STAGES, **{"to_run": STAGES, "before": BEFORE, "parallel": 2, **arguments})


def test_the_time_left_is_that_of_the_longest_chain_or_of_all_that_share_the_machine(clock: Clock) -> None:
    assert page_of().progress() == "0 of 4 stages done, about 13 min left"  # 60 + 600 + 120 s
    assert page_of(parallel=1).progress() == "0 of 4 stages done, about 18 min left"  # 1,080 s
    assert page_of(to_run=["evaluate@kd"]).progress() == "0 of 4 stages done, about 2 min left"
    page = page_of()
    page.ended("data", "Completed", "")
    with page.running("distill@kd") as line:
        clock.now = 400.0
        assert page.progress() == "1 of 4 stages done, about 5 min left"  # 200 + 120 s
        line("a line of a library")
        line("[distill@kd] 3/10 loss=1.2 9m00s left")
        assert page.progress() == "1 of 4 stages done, about 11 min left"  # what it says itself: 540 + 120 s
    page.ended("distill@kd", "Failed", "distill@kd: user: no")
    page.ended("evaluate@kd", "NotReady", "")
    page.ended("evaluate@student", "Completed", "")
    assert page.progress() == "4 of 4 stages done"


def test_what_is_not_known_is_said(clock: Clock) -> None:
    some = {name: seconds for name, seconds in BEFORE.items() if name != "distill@kd"}
    said = page_of(before=some).progress()
    assert said == (
        "0 of 4 stages done, more than 6 min left (it is not known how long these take: distill@kd)"
    )
    assert page_of(before={}).progress().startswith("0 of 4 stages done (it is not known how long")


def test_what_it_has_cost(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.page import hourly_price

    monkeypatch.setenv("DGPO_PRICE", "3")
    monkeypatch.setattr("flows.page.processor_seconds", lambda: 1.5 * clock.now)
    page = page_of(price=hourly_price())
    clock.now = 600.0
    assert page.spent() == "10m00s, 0.250 core hours, cost 0.75"
    for _ in range(2):  # and a second attempt
        with page.running("distill@kd"):
            clock.now += 900.0
    assert page.spent() == "40m00s, 1.000 core hours, 1.000 GPU hours, cost 3.00"
    monkeypatch.delenv("DGPO_PRICE")
    assert page_of(price=hourly_price()).spent() == "0s, 0.000 core hours"
    monkeypatch.setenv("DGPO_PRICE", "three")
    with pytest.raises(UserError, match="DGPO_PRICE=three: not a number"):
        hourly_price()


def test_what_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.page import changes

    assert changes(tmp_path) == ""
    make_project(tmp_path)
    assert changes(tmp_path) == ""  # of a profile that there is not
    (tmp_path / "profiles").symlink_to(Path(__file__).resolve().parents[2] / "profiles")
    many = changes(tmp_path)
    assert many.startswith("Changed from tiny: `world.passages=400`, ") and many.endswith(" more")
    monkeypatch.setattr("flows.page.MOST_CHANGES", 1000)
    change_params(tmp_path, seed=7)
    assert "`seed=7`" in changes(tmp_path) and " more" not in changes(tmp_path)
