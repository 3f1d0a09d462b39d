"""Episodes that have failed teach nothing: neither their own tokens, nor by what they make of the others."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.objectives.policy import group_advantages
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import usable
from dgpo_core.training.optimizer import Stepper
from dgpo_core.training.reinforce import Reinforcer
from tests.dgpo_core.agent.faulty import ENGINE_FAULTS, FaultyEngine
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import exact, question, random_episode, reinforcement, tiny_model

Gradients = list[torch.Tensor]
CONFIG = ReinforceConfig(steps=1, batch_size=12, mini_batch_size=12, group_size=3)


@pytest.fixture
def learn(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, list[Episode]], Gradients]:
    """Return a function that takes a step of these episodes and returns all gradients of its updates."""
    gradients: Gradients = []

    def recorded(self: Stepper) -> float:
        parameters = [p for group in self._parts[0][0].param_groups for p in group["params"]]
        gradients.extend(p.grad.clone() for p in parameters if p.grad is not None)
        return step(self)

    step = Stepper.step
    monkeypatch.setattr(Stepper, "step", recorded)

    def gradients_of(algorithm: str, episodes: list[Episode]) -> Gradients:
        gradients.clear()
        recipe, folder = reinforcement(algorithm), tmp_path / str(len(list(tmp_path.iterdir())))
        student, teacher = tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)
        trainer = Reinforcer(student, teacher, recipe, CONFIG, exact(), 3)
        trainer.train(20, lambda *_: episodes, Checkpoint(folder), lambda: 0.0, lambda *_: None)
        return list(gradients)

    return gradients_of


def same(first: Gradients, second: Gradients) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "reinforce"])
@pytest.mark.parametrize("fault", sorted(ENGINE_FAULTS.keys() - {"slow", "NaN"}))
def test_gradients_are_those_of_the_surviving_episodes(
    tokenizer: PreTrainedTokenizerFast,
    learn: Callable[[str, list[Episode]], Gradients],
    algorithm: str,
    fault: str,
) -> None:
    """Four questions with three episodes each, of which some fail in their first or second turn."""

    def script(seed: tuple[int, ...], turn: int) -> str:
        if seed[0] % 2 and turn == 0:
            return f"<think> {seed[0]} </think><search> Ada </search>"
        return f"<answer> {'Paris' if seed[0] in (1, 4, 6, 9) else 'Rome'} </answer>"

    def fails(seed: tuple[int, ...], turn: int) -> bool:
        return seed[0] in (0, 2, 7) or (seed[0] == 9 and turn == 1)

    engine = FaultyEngine(tokenizer, script, fault, fails)
    loop = AgentLoop(engine, tokenizer, Answering(), ProtocolConfig(), 3)
    tasks = [Task(question(name=f"q{i // 3}"), "onehop", seed=(i,)) for i in range(12)]
    episodes = loop.run(tasks, GREEDY)
    assert [i for i, e in enumerate(episodes) if e.outcome is Outcome.FAILED] == [0, 2, 7, 9]
    survivors = [episode for episode in episodes if episode.outcome is not Outcome.FAILED]
    with_failed, alone = learn(algorithm, episodes), learn(algorithm, survivors)
    assert same(with_failed, alone) and any(gradient.any() for gradient in alone)
    as_wrong = [replace(e, outcome=Outcome.WRONG) if e.outcome is Outcome.FAILED else e for e in episodes]
    assert not same(learn(algorithm, as_wrong), alone), "the test would not see it"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_a_failure_inflates_no_advantage_of_its_group(group: list[tuple[bool, bool]]) -> None:
    """Of GRPO: the survivors' own z-scores, below what a whole group could give, and 0 where they agree.

    Of n values no z-score (n - 1) is above (n - 1) / sqrt(n) (Samuelson, 1968), which rises with n.
    """
    made = [replace(random_episode(i, correct=right), question_id="q") for i, (right, _) in enumerate(group)]
    made = [replace(e, outcome=Outcome.FAILED) if bad else e for e, (_, bad) in zip(made, group, strict=True)]
    if all(bad for _, bad in group):
        return
    survivors = usable(made)
    rewards = np.array([float(episode.correct) for episode in survivors])
    found = group_advantages(torch.tensor(rewards, dtype=torch.float32), [e.question_id for e in survivors])
    deviation = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
    expected = (rewards - rewards.mean()) / deviation if deviation else np.zeros(len(rewards))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
    n, whole = len(rewards), len(group)
    assert float(found.abs().max()) <= (n - 1) / math.sqrt(n) + 1e-4 <= (whole - 1) / math.sqrt(whole) + 2e-4
