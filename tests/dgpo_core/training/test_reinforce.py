"""The loop of PPO: resuming, failed episodes, order of the questions."""

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.errors import InfrastructureError, NotFinite
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import Rollout
from dgpo_core.training.reinforce import Metrics, Reinforcer
from tests.dgpo_core.making import padded, random_episode, tiny_model

CONFIG = ReinforceConfig(
    steps=5, batch_size=6, mini_batch_size=3, actor_learning_rate=1e-2, critic_learning_rate=1e-2,
    dev_every=2, checkpoint_every=2,
)  # fmt: skip
COMPUTE = ComputeConfig(device="cpu", precision="float32")


def rollout(chosen: list[int], step: int) -> list[Episode]:
    """Episodes that depend on the questions and the step alone, one in six failed."""
    episodes = [random_episode(100 * step + i) for i in chosen]
    return [replace(episodes[0], outcome=Outcome.FAILED), *episodes[1:]]


def trained(
    tokenizer: PreTrainedTokenizerFast, folder: Path, kill_at: int | None = None, algorithm: str = "ppo"
) -> tuple[PreTrainedModel, list[Metrics], list[int]]:
    student = tiny_model(tokenizer, 1)
    reported: list[int] = []

    def report(steps: int, rows: list[Metrics]) -> None:
        assert steps == 5
        if len(rows) == kill_at:
            raise KeyboardInterrupt
        reported.append(len(rows))

    recipe = Reinforcement.model_validate(
        {"start": "student", "algorithm": algorithm, "guidance": "selective", "reference": "teacher"}
    )
    trainer = Reinforcer(student, tiny_model(tokenizer, 2), recipe, CONFIG, COMPUTE, 3)
    return student, trainer.train(20, rollout, Checkpoint(folder), lambda: 0.25, report), reported


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_resumed_run_is_bit_identical(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, algorithm: str
) -> None:
    whole, rows, _ = trained(tokenizer, tmp_path / "whole", algorithm=algorithm)
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path / "killed", kill_at=4, algorithm=algorithm)
    random.seed(5)
    torch.manual_seed(99)  # a new process has another state of the global generators
    resumed, again, reported = trained(tokenizer, tmp_path / "killed", algorithm=algorithm)
    assert reported == [3, 4, 5]
    assert again == rows
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("dev_em") for row in rows] == [None, 0.25, None, 0.25, 0.25]
    for row in rows:
        assert row["gate_excluded"] == pytest.approx(1 / (6 if algorithm == "ppo" else 5))
        assert row["gate_open"] + row["gate_closed"] + row["gate_excluded"] == pytest.approx(1)
    assert ("value_loss" in rows[0]) == ("explained_variance" in rows[0]) == (algorithm == "ppo")
    assert any(row["actor_grad_norm"] > 0 for row in rows)


def steps(
    tokenizer: PreTrainedTokenizerFast, folder: Path, episodes: list[Episode]
) -> tuple[PreTrainedModel, list[Metrics]]:
    student = tiny_model(tokenizer, 1)
    config = CONFIG.model_copy(update={"steps": 1, "mini_batch_size": 6})
    recipe = Reinforcement(start="student", guidance="none")
    trainer = Reinforcer(student, None, recipe, config, COMPUTE, 3)
    return student, trainer.train(20, lambda *_: episodes, Checkpoint(folder), lambda: 0.0, lambda *_: None)


def test_failed_episodes_are_not_learned_from(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    good = [random_episode(i) for i in range(4)]
    failed = replace(random_episode(9, correct=False), outcome=Outcome.FAILED)
    first, rows = steps(tokenizer, tmp_path / "a", good)
    second, others = steps(tokenizer, tmp_path / "b", [*good, failed])
    gate = {"gate_excluded": 0.2, "gate_open": 0.0, "gate_closed": 0.8}
    assert rows == [{**rows[0], "gate_excluded": 0.0, "gate_open": 0.0, "gate_closed": 1.0}]
    assert others == [pytest.approx({**rows[0], **gate})]
    assert all(torch.equal(second.state_dict()[n], v) for n, v in first.state_dict().items())
    start = tiny_model(tokenizer, 1).state_dict()
    assert not torch.equal(first.state_dict()["lm_head.weight"], start["lm_head.weight"])


def test_step_without_usable_episodes_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    failed = replace(random_episode(9, correct=False), outcome=Outcome.FAILED)
    silent = random_episode(1, correct=False)
    silent = replace(silent, token_ids=[1, 2], owners=[0, 0], logprobs=[0.0, 0.0])
    student, rows = steps(tokenizer, tmp_path, [failed, silent])
    assert rows == [{"step": 1, "gate_excluded": 1.0, "dev_em": 0.0}]
    start = tiny_model(tokenizer, 1).state_dict()
    assert all(torch.equal(student.state_dict()[n], v) for n, v in start.items())


def test_an_outage_stops_training_which_then_goes_on_exactly(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A step that learns nothing would end as if nothing had happened, and with another model."""
    config = CONFIG.model_copy(update={"steps": 4, "checkpoint_every": 1})
    recipe = Reinforcement(start="student", guidance="none")

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        return [random_episode(100 * step + i) for i in range(len(chosen))]

    def broken(chosen: list[int], step: int) -> list[Episode]:
        made = rollout(chosen, step)
        if step == 2:
            made = [replace(e, outcome=Outcome.FAILED, failure="the index is gone") for e in made]
        return made

    def train(folder: str, source: Rollout) -> dict[str, torch.Tensor]:
        student = tiny_model(tokenizer, 1)
        trainer = Reinforcer(student, None, recipe, config, COMPUTE, 3)
        trainer.train(20, source, Checkpoint(tmp_path / folder), lambda: 0.0, lambda *_: None)
        return student.state_dict()

    whole = train("whole", rollout)
    with pytest.raises(InfrastructureError, match="episodes of a step failed: the index is gone"):
        train("broken", broken)
    again = train("broken", rollout)
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_grpo_asks_each_question_as_often_as_its_group_is_large(tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = Reinforcement(start="student", algorithm="grpo", guidance="none")
    config = ReinforceConfig(batch_size=12, mini_batch_size=6, group_size=5)
    trainer = Reinforcer(tiny_model(tokenizer, 1), None, recipe, config, COMPUTE, 3)
    asked = trainer._questions(20, step=0)
    assert len(asked) == 10 and set(Counter(asked).values()) == {5}


def broken(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        model.get_output_embeddings().weight[7, 7] = math.nan
    return model


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_reference_that_gives_no_numbers_ends_the_training(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, algorithm: str
) -> None:
    recipe = Reinforcement.model_validate(
        {"start": "student", "algorithm": algorithm, "guidance": "selective", "reference": "teacher"}
    )
    student = tiny_model(tokenizer, 1)
    config = CONFIG.model_copy(update={"checkpoint_every": 1})
    trainer = Reinforcer(student, broken(tiny_model(tokenizer, 2)), recipe, config, COMPUTE, 3)
    said = r"the kl_\w+ of step 1 is not a number; lower reinforce\.actor_learning_rate \(now 0\.01\)"
    with pytest.raises(NotFinite, match=said):
        trainer.train(20, rollout, Checkpoint(tmp_path), lambda: 0.0, lambda *_: None)
    assert Checkpoint(tmp_path).load() is None
    start = tiny_model(tokenizer, 1).state_dict()
    assert all(torch.equal(value, start[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("part", ["actor", "critic"])
def test_a_rate_that_is_too_high_ends_the_training_and_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, part: str
) -> None:
    config = CONFIG.model_copy(update={f"{part}_learning_rate": 1e30, "max_grad_norm": 1e30})
    trainer = Reinforcer(
        tiny_model(tokenizer, 1), None, Reinforcement(start="student", guidance="none"), config, COMPUTE, 3
    )
    with pytest.raises(NotFinite, match=rf"of step \d is .*; lower reinforce\.{part}_learning_rate"):
        trainer.train(20, rollout, Checkpoint(tmp_path), lambda: 0.0, lambda *_: None)


@pytest.mark.parametrize("kl", ["k1", "full"])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_rows_without_a_token_count_for_nothing(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, algorithm: str, kl: str
) -> None:
    """Of the student's head, which may have more than the teacher's: log-probabilities, entropy and both
    sides of the KL are as without them."""
    recipe = Reinforcement.model_validate(
        {"start": "student", "algorithm": algorithm, "guidance": "uniform", "reference": "teacher"}
    )
    config = CONFIG.model_copy(update={"steps": 1, "kl_estimator": kl, "batch_size": 12})

    def train(folder: str, *rows: int) -> Metrics:
        student, teacher = (
            padded(tiny_model(tokenizer, seed), more) for seed, more in zip((1, 2), rows, strict=True)
        )
        trainer = Reinforcer(student, teacher, recipe, config, COMPUTE, 3, known=len(tokenizer))
        (row,) = trainer.train(20, rollout, Checkpoint(tmp_path / folder), lambda: 0.0, lambda *_: None)
        return row

    plain = train("plain", 0, 0)
    assert train("student", 64, 0) == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert train("teacher", 0, 64) == pytest.approx(plain, rel=1e-3, abs=1e-6)


def test_a_step_without_a_reward_says_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, correct in (("none", [False] * 4), ("one", [False, False, True, False])):
        _, (row,) = steps(
            tokenizer, tmp_path / name, [random_episode(i, correct=c) for i, c in enumerate(correct)]
        )
        assert row["unrewarded"] == (name == "none")
