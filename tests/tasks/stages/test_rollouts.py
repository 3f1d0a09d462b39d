"""What training stages tell while they run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import Task
from dgpo_core.config.agent import Sampling
from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.training import WatchConfig
from dgpo_core.datasets.records import Question, write_jsonl
from dgpo_core.errors import InfrastructureError, NotFinite
from dgpo_core.training.watch import Watch
from tasks.project.paths import questions_file
from tasks.stages import rollouts
from tasks.stages.rollouts import DevEvaluator, ProcessorTime, reporter, training_rollout
from tasks.stages.stage import Run
from tests.conftest import ROOT
from tests.dgpo_core.making import random_episode

CURE = NotFinite("loss", 0.0).cure


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


def reports(run: Recorder, *shown: str, watch: Watch | None = None) -> Any:
    return reporter(cast(Run, run), shown, ProcessorTime(cast(Run, run)), watch or Watch())


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
    none = {"bad_steps": 0, "collapsed": 0}
    assert run.logged == [(1, {"em": 0.5, "reward": 0.4} | none), (2, {"em": 0.6, "kl_inside": 0.1} | none)]


class Failing:
    """Runs episodes of which the first `failed` fail, and of the first four the last is right."""

    def __init__(self, failed: int) -> None:
        self.failed = failed

    def run(self, tasks: list[Task], sampling: Sampling) -> list[Episode]:
        made = [random_episode(i, correct=i == 3) for i in range(len(tasks))]
        return [replace(e, outcome=Outcome.FAILED) if i < self.failed else e for i, e in enumerate(made)]


@pytest.mark.parametrize(
    ("failed", "message"), [(0, ""), (3, ""), (3, "3 of 4 episodes"), (4, "all 4 episodes")]
)
def test_no_figure_comes_of_an_outage(workplace: Path, failed: int, message: str) -> None:
    """A validation EM is that of the episodes that did not fail; of too few there is none."""

    params = Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml"))
    watch = params.watch.model_copy(update={"max_failed_share": 0.5 if message else 0.75})
    params = params.model_copy(update={"watch": watch})
    for name in params.questions.train:
        questions_file(name, "dev").parent.mkdir(parents=True)
        write_jsonl(questions_file(name, "dev"), [Question(f"{name}-{i}", "who?", ("x",)) for i in range(9)])
    evaluate = DevEvaluator(params, Failing(failed), 4)
    if message:
        with pytest.raises(InfrastructureError, match=message):
            evaluate()
    else:
        assert evaluate() == 1 / (4 - failed)


def test_a_step_of_which_too_much_has_failed_is_not_learned_from() -> None:
    """A share that is allowed is left to the trainer, which leaves the failed ones out."""
    tasks = [Task(Question(f"q{i}", "who?", ("x",)), "onehop") for i in range(5)]
    rollout = training_rollout(Failing(2), tasks, Sampling(), 0, 0.4)
    assert len(rollout([0, 1, 2, 3, 4], 0)) == 5
    with pytest.raises(InfrastructureError, match=r"2 of 4 .* more than watch\.max_failed_share \(0\.4\)"):
        rollout([0, 1, 2, 3], 0)


def test_dropped_steps_and_collapse_are_told_and_are_metrics(tmp_path: Path) -> None:
    """A number that is none would be a gap in MLflow: there is a count at every step."""
    run, watch = Recorder(tmp_path), Watch(WatchConfig(window=1), tmp_path / "dropped")
    report = reports(run, watch=watch)
    rows = [{"step": 1, "em": 0.5}]
    rows.append({"step": 2, **watch.drop(rows, [random_episode(1)], NotFinite("loss", float("nan")))})
    rows.append({"step": 3, "em": 0.1})
    for count in (1, 2, 3):
        report(3, rows[:count])
    assert run.notes == [
        f"step 2 was dropped: the loss is not a number; {CURE} (its episodes: {watch.kept(2)})",
        "collapse of em at step 3: em 0.5 -> 0.1 since step 1, of best EM",
    ]
    assert [values["bad_steps"] for _, values in run.logged] == [0, 1, 1]
    assert [values["collapsed"] for _, values in run.logged] == [0, 0, 1]
    assert run.logged[1] == (2, {"episodes": 1.0, "bad_steps": 1, "collapsed": 0})


def test_the_first_step_without_a_reward_is_said_once(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    report = reports(run)
    rows = [{"step": step, "unrewarded": float(step in (2, 3))} for step in (1, 2, 3)]
    for count in (1, 2, 3):
        report(3, rows[:count])
    (note,) = run.notes
    assert note.startswith("step 2: no episode was rewarded.")
