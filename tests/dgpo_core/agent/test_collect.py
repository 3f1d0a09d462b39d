"""Collections in chunks: order, resuming, seeds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.engine import Generation
from dgpo_core.agent.episode import Outcome
from dgpo_core.agent.loop import AgentLoop, Task, collect, em_of, stable_seed
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.errors import InfrastructureError
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine
from tests.dgpo_core.making import question, random_episode

TASKS = [Task(question(name=f"q{i}"), "onehop", seed=(i,)) for i in range(7)]


def loop(tokenizer: PreTrainedTokenizerFast, engine: ScriptedEngine) -> AgentLoop:
    return AgentLoop(engine, tokenizer, Answering(), ProtocolConfig(), 3)


def test_killed_collection_continues_with_the_same_episodes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def text(seed: tuple[int, ...], turn: int) -> str:
        return f"<answer> {'Paris' if seed[0] % 2 else 'Rome'} </answer>"

    whole = collect(
        loop(tokenizer, ScriptedEngine(tokenizer, text)), TASKS, GREEDY, 3, tmp_path / "a", lambda *_: None
    )
    assert [e.question_id for e in whole] == [f"q{i}" for i in range(7)]
    assert [e.correct for e in whole] == [False, True] * 3 + [False]

    def kill(done: int, total: int, em: float) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(loop(tokenizer, ScriptedEngine(tokenizer, text)), TASKS, GREEDY, 3, tmp_path / "b", kill)
    engine = ScriptedEngine(tokenizer, text)
    seen: list[tuple[int, int, float]] = []
    resumed = collect(
        loop(tokenizer, engine), TASKS, GREEDY, 3, tmp_path / "b", lambda *row: seen.append(row)
    )
    assert resumed == whole
    assert len(engine.requests) == 1, "finished chunks ran again"
    assert seen == [(3, 7, 1 / 3), (6, 7, 0.5), (7, 7, 3 / 7)]
    assert not list((tmp_path / "b").glob("*.part"))


def test_what_is_down_stops_a_collection_that_continues_later(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    class Down(ScriptedEngine):
        def generate(self, *args: Any) -> list[Generation]:
            if len(self.requests) >= 3:
                raise InfrastructureError("the engine is dead")
            return super().generate(*args)

    def text(seed: tuple[int, ...], turn: int) -> str:
        return "<answer> Paris </answer>"

    with pytest.raises(InfrastructureError, match="all 3 episodes of a chunk failed: the engine is dead"):
        collect(loop(tokenizer, Down(tokenizer, text)), TASKS, GREEDY, 3, tmp_path, lambda *_: None)
    engine = ScriptedEngine(tokenizer, text)
    episodes = collect(loop(tokenizer, engine), TASKS, GREEDY, 3, tmp_path, lambda *_: None)
    assert len(engine.requests) == 4
    assert all(episode.correct for episode in episodes)


def test_failed_episodes_are_in_no_average() -> None:
    right, wrong = random_episode(1, correct=True), random_episode(2, correct=False)
    failed = replace(wrong, outcome=Outcome.FAILED)
    assert em_of([right, failed, failed]) == 1.0
    assert em_of([right, wrong, failed]) == 0.5


def test_stable_seeds_are_fixed_and_distinct() -> None:
    assert stable_seed(0, "onehop", "q1") == 4253676138
    assert len({stable_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert stable_seed(1, "1") != stable_seed("1", 1)
