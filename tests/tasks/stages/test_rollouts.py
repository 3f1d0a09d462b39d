"""What training stages tell while they run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import Task
from dgpo_core.config.agent import Sampling
from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.datasets.records import Question, write_jsonl
from dgpo_core.errors import InfrastructureError
from tasks.project.paths import questions_file
from tasks.stages import rollouts
from tasks.stages.rollouts import DevEvaluator, ProcessorTime, reporter
from tasks.stages.stage import Run
from tests.conftest import ROOT
from tests.dgpo_core.making import random_episode


class Recorder:
    leads = True

    def __init__(self, state: Path) -> None:
        self.state = state
        self.shown: list[tuple[float, float, dict[str, Any]]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, done: float, total: float, **values: Any) -> None:
        self.shown.append((done, total, values))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))


def reports(run: Recorder, *shown: str) -> Any:
    return reporter(cast(Run, run), shown, ProcessorTime(cast(Run, run)))


def test_processor_time_goes_on_where_the_checkpoint_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 4, with a checkpoint of step 2: steps 3 and 4 are done again, and count once."""
    now = 0.0
    monkeypatch.setattr(rollouts, "processor_seconds", lambda: now)

    def run(begins: float, ends: dict[int, float]) -> ProcessorTime:
        nonlocal now
        now = begins
        time = ProcessorTime(cast(Run, Recorder(tmp_path)))
        for step, end in ends.items():
            now = end
            time.stepped(step)
        return time

    run(3.0, {1: 5.0, 2: 8.0, 3: 30.0})
    run(100.0, {3: 101.0, 4: 103.5}).write(tmp_path / "kd.csv", 4)
    assert (tmp_path / "kd.csv").read_text().split() == [
        "step,processor_seconds", "1,2.000", "2,5.000", "3,6.000", "4,8.500"
    ]  # fmt: skip


def test_a_resumed_stage_shows_its_last_look_and_none_before_the_first(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    report = reports(run, "em", "kl_inside")
    report(9, [{"step": 1, "em": 0.5, "reward": 0.4}])
    report(9, [{"step": 1, "dev_em": 0.3}, {"step": 2, "em": 0.6, "kl_inside": 0.1}])
    assert run.shown == [(1, 9, {"em": 0.5}), (2, 9, {"em": 0.6, "kl_inside": 0.1, "dev_em": 0.3})]
    assert run.logged == [(1, {"em": 0.5, "reward": 0.4}), (2, {"em": 0.6, "kl_inside": 0.1})]


@pytest.mark.parametrize("failed", [0, 3, 4])
def test_no_figure_comes_of_an_outage(workplace: Path, failed: int) -> None:
    """A validation EM is that of the episodes that did not fail; of none there is none."""

    class Runner:
        def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
            made = [random_episode(i, correct=i == 3) for i in range(len(tasks))]
            return [replace(e, outcome=Outcome.FAILED) if i < failed else e for i, e in enumerate(made)]

    params = Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml"))
    for name in params.questions.train:
        questions_file(name, "dev").parent.mkdir(parents=True)
        write_jsonl(questions_file(name, "dev"), [Question(f"{name}-{i}", "who?", ("x",)) for i in range(9)])
    evaluate = DevEvaluator(params, Runner(), 4)
    if failed == 4:
        with pytest.raises(InfrastructureError, match="all 4 episodes"):
            evaluate()
    else:
        assert evaluate() == 1 / (4 - failed)


def test_the_first_step_without_a_reward_is_said_once(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    report = reports(run)
    rows = [{"step": step, "unrewarded": float(step in (2, 3))} for step in (1, 2, 3)]
    for count in (1, 2, 3):
        report(3, rows[:count])
    (note,) = run.notes
    assert note.startswith("step 2: no episode was rewarded.")
