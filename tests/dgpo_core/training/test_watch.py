"""What trainings are watched for: steps that give no numbers, and collapse."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, read_episodes, read_metadata
from dgpo_core.config.training import ReinforceConfig, WatchConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import Metrics, Rollout, repetition
from dgpo_core.training.optimizer import Stepper
from dgpo_core.training.reinforce import Reinforcer
from dgpo_core.training.watch import BAD, Watch
from tests.dgpo_core.making import exact, random_episode, reinforcement, tiny_model, weights_of

CONFIG = ReinforceConfig(
    steps=6, batch_size=6, mini_batch_size=6, actor_learning_rate=1e-2, critic_learning_rate=1e-2,
    actor_learning_rate_warmup=0.0, critic_learning_rate_warmup=0.0, dev_every=1, checkpoint_every=1,
)  # fmt: skip
Weights = dict[str, torch.Tensor]


def healthy(chosen: list[int], step: int) -> list[Episode]:
    return [random_episode(100 * step + i) for i in range(len(chosen))]


def missing_logprob(episode: Episode) -> Episode:
    """What the engine sampled with is no number: with `old_logprobs: rollout` no loss is one either."""
    return replace(episode, logprobs=[math.nan] * len(episode.logprobs))


def broken(*steps: int, how: Callable[[Episode], Episode] = missing_logprob) -> Rollout:
    """`healthy`, but for the first episode of these steps (from 1)."""

    def episodes(chosen: list[int], step: int) -> list[Episode]:
        first, *others = healthy(chosen, step)
        return [how(first) if step + 1 in steps else first, *others]

    return episodes


def silent(*steps: int) -> Rollout:
    """`healthy`, but for these steps: the engine gives log-probabilities that are none, and so no episode."""

    def episodes(chosen: list[int], step: int) -> list[Episode]:
        if step + 1 in steps:
            raise NotFinite("log-probability of a sampled token", math.nan)
        return healthy(chosen, step)

    return episodes


class Training:
    """A training of a small student, in a folder of its own; `looks` are its weights after each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.tokenizer, self.folder, self.looks = tokenizer, folder, list[Weights]()

    def __call__(
        self,
        rollout: Rollout,
        watch: dict[str, Any] | None = None,
        algorithm: str = "ppo",
        ems: list[float] | None = None,
        kill_at: int | None = None,
        **settings: Any,
    ) -> list[Metrics]:
        self.student = tiny_model(self.tokenizer, 1)
        self.looks = [weights_of(self.student)]
        config = CONFIG.model_copy(update={"old_logprobs": "rollout"} | settings)
        watched = Watch(WatchConfig.model_validate(watch or {}), self.folder / "dropped")
        recipe = reinforcement(algorithm, "none")
        trainer = Reinforcer(self.student, None, recipe, config, exact(), 3, watch=watched)

        def evaluate() -> float:
            self.looks.append(weights_of(self.student))
            return ems[len(self.looks) - 2] if ems else 0.25

        def report(_: int, rows: list[Metrics]) -> None:
            if len(rows) == kill_at:
                raise KeyboardInterrupt

        return trainer.train(20, rollout, Checkpoint(self.folder), evaluate, report)


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Training:
    return Training(tokenizer, tmp_path)


def equal(first: Weights, second: Weights) -> bool:
    return all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce"])
@pytest.mark.parametrize("fault", [broken, silent])
def test_a_step_without_numbers_is_as_if_it_had_not_been(
    train: Training, algorithm: str, fault: Callable[..., Rollout]
) -> None:
    """Weights stay; the optimiser too: what follows is the training that has never had this step."""
    rows = train(fault(2), algorithm=algorithm, steps=3)
    assert [BAD in row for row in rows] == [False, True, False]
    written = 0.0 if fault is silent else 5.0 if algorithm == "grpo" else 6.0
    assert rows[1] == {"step": 2, "episodes": written, "gate_excluded": 1.0, BAD: 1.0, "dev_em": 0.25}
    after = train.looks
    assert equal(after[1], after[2]) and not equal(after[2], after[3])
    without = Training(train.tokenizer, train.folder / "without")
    without(lambda chosen, step: healthy(chosen, 2 * step), algorithm=algorithm, steps=2)
    for name, value in without.looks[2].items():
        torch.testing.assert_close(after[3][name], value)


def test_the_batch_of_a_dropped_step_is_kept_with_the_reason(train: Training) -> None:
    train(broken(2), steps=2)
    (kept,) = (train.folder / "dropped").iterdir()
    assert kept.name == "step-000002.parquet"
    assert read_metadata(kept)["reason"].startswith("the log-probability of a sampled token is not")
    episodes = read_episodes(kept)
    assert [e.question_id for e in episodes] == [e.question_id for e in healthy([0] * 6, 1)]
    assert math.isnan(episodes[0].logprobs[0]) and not math.isnan(episodes[1].logprobs[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_without_numbers_drops_the_step(
    train: Training, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The loss is a number: only the second update's gradient is none."""
    updates = 0

    def step(self: Stepper) -> float:
        nonlocal updates
        updates += 1
        if updates == 2:
            self._parts[0][0].param_groups[0]["params"][0].grad.fill_(value)
        return whole(self)

    whole = Stepper.step
    monkeypatch.setattr(Stepper, "step", step)
    rows = train(healthy, algorithm="grpo", steps=3)
    assert [BAD in row for row in rows] == [False, True, False]
    assert equal(train.looks[1], train.looks[2]) and not equal(train.looks[2], train.looks[3])
    assert all(torch.isfinite(weight).all() for weight in train.looks[3].values())


def test_too_many_in_a_row_stop_with_the_last_good_checkpoint_and_go_on_from_it(train: Training) -> None:
    """Two, and one that is good, and three: the checkpoint is the good one's, and a mended engine goes on."""
    config = {"max_bad_steps": 3}
    with pytest.raises(NotFinite, match=r"sampled token of step 7 is not a number; lower reinforce\.actor"):
        train(broken(2, 3, 5, 6, 7), config, steps=8)
    state = Checkpoint(train.folder).load()
    assert state is not None and [BAD in row for row in state["rows"]] == [False, True, True, False]
    last_good = train.looks[4]
    assert equal(last_good, weights_of(train.student))
    rows = train(broken(2, 3), config, steps=8)
    assert [row["step"] for row in rows if BAD in row] == [2, 3]
    whole = Training(train.tokenizer, train.folder / "whole")
    whole(broken(2, 3), config, steps=8)
    assert equal(whole.looks[-1], train.looks[-1])


def test_an_engine_that_an_update_has_spent_ends_the_training(
    train: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgpo_core.training.engines.TorchEngine.spent", True)
    with pytest.raises(NotFinite, match="sampled token of step 2"):
        train(broken(2))
    state = Checkpoint(train.folder).load()
    assert state is not None and len(state["rows"]) == 1


STABLE: Metrics = {
    "em": 0.4, "searches": 1.2, "invalid_actions": 0.1, "response_tokens": 80.0, "entropy": 0.3,
    "kl_inside": 0.05,
}  # fmt: skip


def history(*parts: tuple[int, dict[str, float]]) -> list[Metrics]:
    rows = [STABLE | changes for count, changes in parts for _ in range(count)]
    return [{"step": step, **row} for step, row in enumerate(rows, 1)]


def watching(**settings: Any) -> Watch:
    return Watch(WatchConfig.model_validate({"window": 4} | settings))


@pytest.mark.parametrize(
    ("figure", "changes"),
    [
        ("em", {"em": 0.19}),
        ("searches", {"searches": 0.59}),
        ("searches", {"searches": 3.5}),
        ("invalid_actions", {"invalid_actions": 0.36}),
        ("response_tokens", {"response_tokens": 161.0}),
        ("response_tokens", {"response_tokens": 39.0}),
        ("entropy", {"entropy": 0.07}),
        ("entropy", {"entropy": 1.71}),
        ("kl", {"kl_inside": 0.31}),
        ("repetition", {"repetition": 0.9}),
    ],
)
def test_each_figure_has_its_alarm(figure: str, changes: dict[str, float]) -> None:
    """After a whole window, once; and nothing else is told. Dropped steps do not count."""
    watch = watching()
    rows = history((6, {}), (9, changes))
    rows.insert(7, {"step": 7.5, BAD: 1.0})
    told = [step for step in range(1, 17) if watch.new_alarms(rows[:step])]
    assert len(told) == 1
    (alarm,) = watch.alarms(rows).items()
    assert alarm[0] == figure and alarm[1].endswith("since step 4, of best EM")
    assert watching(**{figure: "ignore"}).alarms(rows) == {}


@pytest.mark.parametrize(
    "rows",
    [
        history((3, {}), (1, {"em": 0.0})),  # no window yet
        history((20, {"em": 0.02}), (20, {"em": 0.0, "searches": 0.0})),  # it has never learned
        history((6, {}), (2, {"em": 0.0, "searches": 0.0, "entropy": 0.0}), (6, {})),  # a dip
        history(
            (20, {}), (20, {"em": 0.6, "searches": 4.0, "response_tokens": 300.0})
        ),  # it learns to search
        [{"step": step, "loss": math.inf} for step in range(20)],  # no EM is known
    ],
)
def test_what_is_no_collapse(rows: list[Metrics]) -> None:
    assert watching().alarms(rows) == {}


def falls_at(last: int) -> Rollout:
    """Episodes that are right up to this step, and wrong from there on."""
    return lambda chosen, step: [
        random_episode(100 * step + i, correct=step < last and i % 2 == 0) for i in range(len(chosen))
    ]


EMS = [0.1, 0.5, 0.3, 0.2, 0.1, 0.1]


def test_a_warning_changes_nothing(train: Training) -> None:
    rows = train(falls_at(3), {"window": 1}, ems=EMS)
    last = train.looks[-1]
    other = Training(train.tokenizer, train.folder / "other")
    assert other(falls_at(3), {"window": 1, "em": "ignore"}, ems=EMS) == rows
    assert equal(other.looks[-1], last)


def test_a_collapse_rolls_back_to_the_best_validated_model(train: Training) -> None:
    """Killed and continued it does the same; what was over does not go on."""
    config = {"window": 1, "em": "roll_back"}
    rows = train(falls_at(3), config, ems=EMS)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert equal(weights_of(train.student), train.looks[2])
    other = Training(train.tokenizer, train.folder / "other")
    with pytest.raises(KeyboardInterrupt):
        other(falls_at(3), config, ems=EMS, kill_at=4)
    for _ in range(2):
        assert other(falls_at(3), config, ems=EMS[3:]) == rows
        assert equal(weights_of(other.student), weights_of(train.student))


def test_without_a_collapse_the_last_model_stays(train: Training) -> None:
    train(falls_at(9), {"window": 1, "em": "roll_back"}, ems=EMS)
    assert equal(weights_of(train.student), train.looks[-1])


@pytest.mark.parametrize(("action", "dev_every"), [("stop", 1), ("roll_back", 6)])
def test_a_collapse_stops_training_which_may_go_on(train: Training, action: str, dev_every: int) -> None:
    """Also where no model was validated that it could be rolled back to."""
    config = {"window": 1, "em": action}
    with pytest.raises(UserError, match=r"collapsed at step 4: em 0.5 -> 0 since step 1.*watch.em: warn"):
        train(falls_at(3), config, ems=EMS, dev_every=dev_every)
    state = Checkpoint(train.folder).load()
    assert state is not None and len(state["rows"]) == 4
    assert len(train(falls_at(3), {"window": 1}, ems=EMS[4:], dev_every=dev_every)) == 6


def test_repetition_is_seq_rep_4() -> None:
    """Welleck et al. (2020): 1 - unique 4-grams / 4-grams, here of each turn."""
    one = random_episode(1)
    owners, ids = [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1], [5, 5, 7, 8, 7, 8, 7, 8, 7, 8, 9, 1, 2, 3]
    looping = replace(one, token_ids=ids, owners=owners, logprobs=[0.0] * 14)
    assert repetition([looping]) == pytest.approx(1 - 2 / 5), "the second turn has no 4-gram"
    assert repetition([]) == 0.0
