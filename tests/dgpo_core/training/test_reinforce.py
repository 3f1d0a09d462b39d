"""The loop of PPO: resuming, failed episodes, order of the questions."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.training import ComputeConfig, Recipe, ReinforceConfig
from dgpo_core.protocol.episode import Episode, Outcome
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.reinforce import Metrics, Reinforcer, question_order
from tests.dgpo_core.making import random_episode, tiny_model

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
    tokenizer: PreTrainedTokenizerFast, folder: Path, kill_at: int | None = None
) -> tuple[PreTrainedModel, list[Metrics], list[int]]:
    student = tiny_model(tokenizer, 1)
    reported: list[int] = []

    def report(step: int, steps: int, row: Metrics) -> None:
        assert steps == 5
        if step == kill_at:
            raise KeyboardInterrupt
        reported.append(step)

    recipe = Recipe(rl="ppo", guidance="selective")
    trainer = Reinforcer(student, tiny_model(tokenizer, 2), recipe, CONFIG, COMPUTE, 3)
    return student, trainer.train(20, rollout, Checkpoint(folder), lambda: 0.25, report), reported


def test_resumed_run_is_bit_identical(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    whole, rows, _ = trained(tokenizer, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tokenizer, tmp_path / "killed", kill_at=4)
    random.seed(5)
    torch.manual_seed(99)  # a new process has another state of the global generators
    resumed, again, reported = trained(tokenizer, tmp_path / "killed")
    assert reported == [3, 4, 5]
    assert again == rows
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row.get("dev_em") for row in rows] == [None, 0.25, None, 0.25, 0.25]
    assert {row["failed"] for row in rows} == {1.0}
    assert any(row["actor_grad_norm"] > 0 for row in rows)


def steps(
    tokenizer: PreTrainedTokenizerFast, folder: Path, episodes: list[Episode]
) -> tuple[PreTrainedModel, list[Metrics]]:
    student = tiny_model(tokenizer, 1)
    config = CONFIG.model_copy(update={"steps": 1, "mini_batch_size": 6})
    trainer = Reinforcer(student, None, Recipe(rl="ppo"), config, COMPUTE, 3)
    return student, trainer.train(20, lambda *_: episodes, Checkpoint(folder), lambda: 0.0, lambda *_: None)


def test_failed_episodes_are_not_learned_from(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    good = [random_episode(i) for i in range(4)]
    failed = replace(random_episode(9, correct=False), outcome=Outcome.FAILED)
    first, rows = steps(tokenizer, tmp_path / "a", good)
    second, others = steps(tokenizer, tmp_path / "b", [*good, failed])
    assert others == [{**rows[0], "failed": 1.0}]
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
    assert rows == [{"step": 1, "failed": 1.0, "dev_em": 0.0}]
    start = tiny_model(tokenizer, 1).state_dict()
    assert all(torch.equal(student.state_dict()[n], v) for n, v in start.items())


def test_questions_come_in_shuffled_epochs() -> None:
    drawn = [i for step in range(10) for i in question_order(7, 5, step, seed=1)]
    epochs = [drawn[start : start + 7] for start in range(0, 49, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert question_order(7, 5, 3, seed=1) == drawn[15:20]
    assert question_order(7, 5, 3, seed=2) != drawn[15:20]
    assert Counter(question_order(3, 9, 0, seed=1)) == {0: 3, 1: 3, 2: 3}
