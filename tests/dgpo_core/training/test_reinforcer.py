"""The loop of reinforcement learning: order, resuming, failed episodes, numbers that are none."""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Outcome, Search
from dgpo_core.config.training import ReinforceConfig, WatchConfig
from dgpo_core.errors import InfrastructureError, NotFinite
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import Metrics, Rollout
from dgpo_core.training.reinforce import Answered, Reinforcer
from dgpo_core.training.watch import Watch
from tests.dgpo_core.making import exact, padded, random_episode, reinforcement, tiny_model, weights_of

CONFIG = ReinforceConfig(
    steps=5, batch_size=6, mini_batch_size=3, actor_learning_rate=1e-2, critic_learning_rate=1e-2,
    dev_every=2, checkpoint_every=2,
)  # fmt: skip


FIRST = Watch(WatchConfig(max_bad_steps=1))  # the first step that gives no numbers ends training


def rollout(chosen: list[int], step: int) -> list[Episode]:
    """Episodes that depend on the questions and the step alone, one in six failed."""
    episodes = [random_episode(100 * step + i) for i in chosen]
    return [replace(episodes[0], outcome=Outcome.FAILED), *episodes[1:]]


def noted(asked: dict[int, list[int]]) -> Rollout:
    """`rollout`, which writes down the questions of every step."""

    def episodes(chosen: list[int], step: int) -> list[Episode]:
        asked[step] = chosen
        return rollout(chosen, step)

    return episodes


@dataclass
class Run:
    """A training: its student, before and after, and its rows."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    rows: list[Metrics]

    @property
    def changed(self) -> bool:
        return not equal(self.before, self.after)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(second[name], value) for name, value in first.items())


Train = Callable[..., Run]


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Train:
    """Return a function that trains a small student, with its checkpoint in a `folder` of the test's own."""

    def run(
        algorithm: str = "ppo",
        guidance: str = "selective",
        *,
        folder: str = "state",
        episodes: Rollout = rollout,
        teacher: PreTrainedModel | None = None,
        student: PreTrainedModel | None = None,
        kill_at: int | None = None,
        tokens: int = 10_000,
        row: dict[str, Any] | None = None,
        evaluate: Callable[[PreTrainedModel], float] = lambda _: 0.25,
        answered: Answered = frozenset(),
        watch: Watch | None = None,
        **settings: Any,
    ) -> Run:
        student = student or tiny_model(tokenizer, 1)
        before = weights_of(student)
        reference = None if guidance == "none" else teacher or tiny_model(tokenizer, 2)
        config = CONFIG.model_copy(update=settings)
        recipe = reinforcement(algorithm, guidance, **row or {})
        trainer = Reinforcer(
            student, reference, recipe, config, exact(tokens), 3, len(tokenizer), answered=answered,
            decode=lambda ids: "<search>q</search>", watch=watch or Watch(),
        )  # fmt: skip

        def report(steps: int, rows: list[Metrics]) -> None:
            assert steps == config.steps
            if len(rows) == kill_at:
                raise KeyboardInterrupt

        checkpoint = Checkpoint(tmp_path / folder)
        rows = trainer.train(20, episodes, checkpoint, lambda: evaluate(student), report)
        return Run(before, weights_of(student), rows)

    return run


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce"])
def test_threads_change_no_bit(train: Train, algorithm: str) -> None:
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(train(algorithm, folder=f"threads-{threads}", tokens=60))
    finally:
        torch.set_num_threads(before)
    assert runs[0].changed
    for run in runs[1:]:
        assert run.rows == runs[0].rows and equal(run.after, runs[0].after)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce"])
def test_resumed_run_is_bit_identical(train: Train, algorithm: str) -> None:
    whole = train(algorithm)
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, folder="killed", kill_at=4)
    random.seed(5)
    torch.manual_seed(99)  # a new process has another state of the global generators
    asked: dict[int, list[int]] = {}
    resumed = train(algorithm, folder="killed", episodes=noted(asked))
    assert list(asked) == [2, 3, 4]
    assert resumed.rows == whole.rows and equal(resumed.after, whole.after)
    assert [row["step"] for row in whole.rows] == [1, 2, 3, 4, 5]
    assert [row.get("dev_em") for row in whole.rows] == [None, 0.25, None, 0.25, 0.25]
    for row in whole.rows:
        assert row["gate_excluded"] == pytest.approx(1 / (5 if algorithm == "grpo" else 6))
        assert row["gate_open"] + row["gate_closed"] + row["gate_excluded"] == pytest.approx(1)
    first = whole.rows[0]
    assert ("value_loss" in first) == ("explained_variance" in first) == (algorithm == "ppo")
    assert any(row["actor_grad_norm"] > 0 for row in whole.rows)


LOSS: dict[str, Any] = {"placement": "loss", "divergence": "reverse_kl", "weight": 0.5}


@pytest.mark.parametrize(
    ("algorithm", "row", "settings", "column"),
    [
        ("ppo", LOSS | {"turns": "sod"}, {}, "guidance_loss"),
        ("ppo", LOSS | {"turns": "last"}, {}, "guidance_loss"),
        ("grpo", {}, {"preserve_weight": 0.5}, "preserve_loss"),
        ("reinforce", {}, {"repeat_penalty": 0.5}, "reward"),
    ],
)
def test_variants_change_the_training_and_resume_exactly(
    train: Train, algorithm: str, row: dict[str, Any], settings: dict[str, Any], column: str
) -> None:
    def episodes(chosen: list[int], step: int) -> list[Episode]:
        found = [[Search("q", ["p"], [1.0]) for _ in e.turns[:-1]] for e in rollout(chosen, step)]
        return [replace(e, searches=own) for e, own in zip(rollout(chosen, step), found, strict=True)]

    how: dict[str, Any] = {"episodes": episodes, "tokens": 60, **settings}
    whole = train(algorithm, row=row, **how)
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, folder="killed", kill_at=4, row=row, **how)
    resumed = train(algorithm, folder="killed", row=row, **how)
    assert resumed.rows == whole.rows and equal(resumed.after, whole.after)
    plain_row = {key: value for key, value in row.items() if key != "turns"}
    plain = train(algorithm, folder="plain", row=plain_row, **how | dict.fromkeys(settings, 0.0))
    assert not equal(plain.after, whole.after)
    assert [r[column] for r in whole.rows] != [r.get(column) for r in plain.rows]


def test_best_validated_model_is_kept_and_training_ends_without_patience(train: Train) -> None:
    """Of equal ones the first; killed after it and continued, the same."""
    seen: list[dict[str, torch.Tensor]] = []

    def evaluate(student: PreTrainedModel) -> float:
        seen.append(weights_of(student))
        return [0.1, 0.5, 0.5, 0.2, 0.9][len(seen) - 1]

    settings: dict[str, Any] = {"dev_every": 1, "checkpoint_every": 1, "patience": 2}
    whole = train(evaluate=evaluate, **settings)
    assert [row["dev_em"] for row in whole.rows] == [0.1, 0.5, 0.5, 0.2]
    assert equal(seen[1], whole.after) and not equal(seen[-1], whole.after)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(folder="killed", evaluate=evaluate, kill_at=3, **settings)
    seen.pop()  # it was validated, and killed before its checkpoint
    again = train(folder="killed", evaluate=evaluate, **settings)
    assert again.rows == whole.rows and equal(again.after, whole.after)
    over = train(folder="killed", evaluate=evaluate, **settings)
    assert over.rows == whole.rows and equal(over.after, whole.after), "a training that was over goes on"


def test_a_stop_while_episodes_are_sampled_loses_no_finished_step(train: Train) -> None:
    """SIGTERM, long before the next regular checkpoint: only the step that it met is sampled again."""
    sampled: list[int] = []

    def stopped(chosen: list[int], step: int) -> list[Episode]:
        sampled.append(step)
        if sampled.count(step) == 1 and step == 3:
            raise SystemExit(143)
        return rollout(chosen, step)

    settings: dict[str, Any] = {"checkpoint_every": 100, "steps": 5}
    whole = train(**settings)
    with pytest.raises(SystemExit):
        train(folder="stopped", episodes=stopped, **settings)
    again = train(folder="stopped", episodes=stopped, **settings)
    assert sampled == [0, 1, 2, 3, 3, 4]
    assert again.rows == whole.rows and equal(again.after, whole.after)


def test_critic_learns_alone_at_first(train: Train) -> None:
    """So the first step's actor is the student; the critic's steps are those of a training without it."""
    run = train(critic_only_steps=2, steps=3, guidance="none")
    plain = train(folder="plain", steps=3, guidance="none")
    assert ["policy_loss" in row for row in run.rows] == [False, False, True]
    assert [row["value_loss"] > 0 for row in run.rows] == [True] * 3
    assert run.rows[0]["value_loss"] == plain.rows[0]["value_loss"]
    alone = train(folder="alone", critic_only_steps=2, steps=2, guidance="none")
    assert not alone.changed and run.changed
    grpo = train("grpo", folder="grpo", critic_only_steps=2, steps=2, guidance="none")
    assert "policy_loss" in grpo.rows[0], "GRPO has no critic to wait for"


def test_gate_is_open_where_the_teacher_was_right(train: Train) -> None:
    episodes = [replace(random_episode(i, correct=False), question_id=f"q{i}") for i in range(4)]
    answered = frozenset({("onehop", "q1"), ("twohop", "q2")})
    run = train("ppo", "teachable", episodes=lambda *_: episodes, steps=1, answered=answered)
    assert run.rows[0]["gate_open"] == 0.25


OneStep = Callable[[list[Episode]], Run]
FAILED = replace(random_episode(9, correct=False), outcome=Outcome.FAILED)


@pytest.fixture
def one_step(train: Train) -> OneStep:
    """Return a function that trains one step without guidance on these episodes."""
    how = {"guidance": "none", "steps": 1, "mini_batch_size": 6}
    return lambda episodes: train(episodes=lambda *_: episodes, **how)


def test_failed_episodes_are_not_learned_from(one_step: OneStep) -> None:
    good = [random_episode(i) for i in range(4)]
    first, second = one_step(good), one_step([*good, FAILED])
    gate = {"episodes": 5, "gate_excluded": 0.2, "gate_open": 0.0, "gate_closed": 0.8}
    assert first.rows == [{**first.rows[0], "gate_excluded": 0.0, "gate_open": 0.0, "gate_closed": 1.0}]
    assert second.rows == [pytest.approx({**first.rows[0], **gate})]
    assert first.changed and equal(first.after, second.after)


def test_step_without_usable_episodes_changes_nothing(one_step: OneStep) -> None:
    silent = random_episode(1, correct=False)
    silent = replace(silent, token_ids=[1, 2], owners=[0, 0], logprobs=[0.0, 0.0])
    run = one_step([FAILED, silent])
    assert run.rows == [{"step": 1, "episodes": 2, "gate_excluded": 1.0, "dev_em": 0.25}]
    assert not run.changed


def test_an_outage_stops_training_which_then_goes_on_exactly(train: Train) -> None:
    """A step that learns nothing would end as if nothing had happened, and with another model."""

    def broken(chosen: list[int], step: int) -> list[Episode]:
        episodes = rollout(chosen, step)
        if step == 2:
            return [replace(e, outcome=Outcome.FAILED, failure="the index is gone") for e in episodes]
        return episodes

    settings: dict[str, Any] = {"guidance": "none", "steps": 4, "checkpoint_every": 1}
    whole = train(**settings)
    with pytest.raises(InfrastructureError, match="episodes of a step failed: the index is gone"):
        train(folder="broken", episodes=broken, **settings)
    assert equal(train(folder="broken", **settings).after, whole.after)


def test_grpo_asks_each_question_as_often_as_its_group_is_large(train: Train) -> None:
    asked: dict[int, list[int]] = {}
    train("grpo", "none", episodes=noted(asked), steps=1, batch_size=12, group_size=5)
    assert len(asked[0]) == 10 and set(Counter(asked[0]).values()) == {5}


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_reference_that_gives_no_numbers_ends_the_training(
    train: Train, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, algorithm: str
) -> None:
    student, teacher = tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[7, 7] = math.nan
    before = weights_of(student)
    said = r"the kl_\w+ of step 1 is not a number; lower reinforce\.actor_learning_rate \(now 0\.01\)"
    with pytest.raises(NotFinite, match=said):
        train(algorithm, teacher=teacher, student=student, checkpoint_every=1, watch=FIRST)
    assert Checkpoint(tmp_path / "state").load() is None
    assert equal(before, student.state_dict())


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_a_rate_that_is_too_high_ends_the_training_and_is_named(train: Train, part: str) -> None:
    settings: dict[str, Any] = {f"{part}_learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(NotFinite, match=rf"of step \d is .*; lower reinforce\.{part}_learning_rate"):
        train(guidance="none", watch=FIRST, **settings)


@pytest.mark.parametrize(
    "kl",
    [
        {"divergence": "k1"},
        {"divergence": "reverse_kl"},
        {"divergence": "reverse_kl", "placement": "loss", "weight": 0.5},
    ],
)
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_rows_without_a_token_count_for_nothing(
    train: Train, tokenizer: PreTrainedTokenizerFast, algorithm: str, kl: dict[str, Any]
) -> None:
    """Log-probabilities, entropy and both sides of the KL are as without more rows in either head."""

    def first_row(folder: str, *more: int) -> Metrics:
        student, teacher = (
            padded(tiny_model(tokenizer, seed), rows) for seed, rows in zip((1, 2), more, strict=True)
        )
        models = {"teacher": teacher, "student": student}
        settings: dict[str, Any] = {"steps": 1, "row": kl, "batch_size": 12}
        return train(algorithm, "uniform", folder=folder, **models, **settings).rows[0]

    plain = first_row("plain", 0, 0)
    assert first_row("student", 64, 0) == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert first_row("teacher", 0, 64) == pytest.approx(plain, rel=1e-3, abs=1e-6)


def test_a_step_without_a_reward_says_so(one_step: OneStep) -> None:
    for right in ([], [2]):
        (row,) = one_step([random_episode(i, correct=i in right) for i in range(4)]).rows
        assert row["unrewarded"] == (not right)
