"""A challenger offered by a flow: conditions, a person's answer, champion; real registry, real server."""

import contextvars
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo_core.errors import UserError
from tasks.commands.promote import promote
from tasks.tracking.evaluations import register_trained
from tasks.tracking.registry import CHALLENGER, CHAMPION, store
from tests.tasks.conftest import empty_store, own_store  # noqa: F401  fixtures
from tests.tasks.trained import BETTER, WORSE, make_trained, train

FORM = {"approve": True, "comment": "looks right"}


def holder(alias: str) -> str | None:
    with store() as registry:
        version = registry.alias(alias)
    return version.number if version else None


def champion() -> str | None:
    return holder(CHAMPION)


@pytest.fixture
def project(api: str, own_store: Path) -> Path:  # noqa: F811
    return own_store


def challenge(project: Path, scores: Any, approval: bool) -> None:
    """Train and register kd and dgpo, and offer dgpo's version, the second, as challenger."""
    make_trained(project, scores, approval=approval)
    register_trained(challenger=True)


def offered(tree: Path, name: str) -> str:
    from prefect import flow

    from flows.promotion import offer

    @flow(name="offering", flow_run_name=name)
    def offering() -> str:
        return offer(tree)

    return offering()


def answer_when_paused(name: str, form: dict[str, Any], seen: list[str]) -> threading.Thread:
    """Look at the dashboard until the run waits, and then fill in the form, as somebody would.

    A thread of its own would ask whichever server the environment names, and not the tests' one.
    """
    from prefect import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.flow_runs import resume_flow_run

    def watch() -> None:
        wanted = FlowRunFilter(name=FlowRunFilterName(any_=[name]))
        for _ in range(600):
            with get_client(sync_client=True) as client:
                found = client.read_flow_runs(flow_run_filter=wanted)
            if found and found[0].state and found[0].state.is_paused():
                seen.append(str(champion()))
                resume_flow_run(found[0].id, run_input=form)
                return
            time.sleep(0.2)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(watch,), daemon=True)
    thread.start()
    return thread


@pytest.mark.thorough
@pytest.mark.parametrize("approve", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_person_decides_about_what_passes(
    project: Path, approve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.promotion.PATIENCE", timedelta(minutes=3))
    challenge(project, BETTER, approval=True)
    assert promote("1", dry_run=False, yes=True) == 0  # kd
    seen: list[str] = []
    thread = answer_when_paused(f"ask-{approve}", {**FORM, "approve": approve}, seen)
    said = offered(project, f"ask-{approve}")
    thread.join(30)
    assert seen == ["1"]  # while it waited, nothing had changed
    assert champion() == ("2" if approve else "1")
    expected = "version 2 (dgpo) is the champion" if approve else "version 2 (dgpo) was not approved"
    assert said.startswith(expected)
    assert approve or said.endswith("looks right")


@pytest.mark.thorough
def test_what_does_not_pass_is_not_asked_about(project: Path) -> None:
    challenge(project, WORSE, approval=True)
    assert promote("1", dry_run=False, yes=True) == 0
    assert "does not meet every condition" in offered(project, "worse")
    assert champion() == "1"


@pytest.mark.slow
def test_nobody_is_asked_where_the_settings_want_nobody(project: Path) -> None:
    challenge(project, BETTER, approval=False)
    assert offered(project, "free") == "version 2 (dgpo) is the champion"
    assert champion() == "2"


@pytest.mark.thorough
def test_a_run_offers_its_own_model_whoever_reported_last(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge(project, BETTER, approval=False)
    with store() as registry:
        registry.make_challenger(registry.version("1"))
    monkeypatch.chdir(project.parent)  # a flow works in the project, its stages in the run's worktree
    assert offered(project, "own") == "version 2 (dgpo) is the champion"
    assert (champion(), holder(CHALLENGER)) == ("2", "2")


def test_a_model_that_is_not_registered_is_said_and_no_other_is_offered(project: Path) -> None:
    challenge(project, BETTER, approval=False)
    train(project, "dgpo", "weights that MLflow has not seen", BETTER)
    with pytest.raises(UserError, match=r"no version is this working tree's model of dgpo.*`dgpo register`"):
        offered(project, "nobody")
    assert (champion(), holder(CHALLENGER)) == (None, "2")


def test_a_condition_that_is_no_condition_promotes_nobody(project: Path) -> None:
    challenge(project, BETTER, approval=False)
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["promote"]["margin"] = -1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=r"promote\.margin"):
        offered(project, "broken")
    assert champion() is None
