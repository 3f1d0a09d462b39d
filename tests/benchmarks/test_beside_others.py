"""Comparisons with other projects: they do the same work as ours, and what is said of them is computed."""

from pathlib import Path

import pyperf
import pytest

from benchmarks.__main__ import dropped, ratios_of
from benchmarks.alternation import Rounds, alternate, fill, save, table
from benchmarks.peer_loops import BatchLoop
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, ProtocolConfig, RolloutConfig
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.models import load_model, load_tokenizer
from tests.conftest import ROOT
from tests.dgpo_core.agent.scripted import Answering

PASSAGES = [Passage("7", "Kilu Sipiti", "Kilu Sipiti was born in 1938. The employer was Voduso Works.")]


@pytest.mark.parametrize("stops", [False, True])
def test_greedy_episodes_are_those_of_search_r1s_loop(stops: bool) -> None:
    source = str(ROOT / "models" / "teacher")
    model, tokenizer = load_model(source), load_tokenizer(source)
    config = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=64, max_information=320)
    asked = ["When was Kilu Sipiti born?", "Who was the employer of Kilu Sipiti?", "Was Vuli a singer?"]
    engine = TransformersEngine(model, tokenizer, RolloutConfig(precision="float32", batch_tokens=600))
    ours = AgentLoop(engine, tokenizer, Answering(PASSAGES), config, 1)
    theirs = BatchLoop(model, tokenizer, Answering(PASSAGES), config, 1, stops)
    tasks = [Task(Question(str(i), text, ("1938",)), "onehop") for i, text in enumerate(asked)]
    episodes = ours.run(tasks, GREEDY)
    assert any(episode.searches for episode in episodes)
    assert [tokenizer.decode(e.token_ids) for e in episodes] == theirs.run(asked, GREEDY)


def test_contenders_take_turns(tmp_path: Path) -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    rounds = alternate("x", contenders, 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    save([rounds], tmp_path / "times.json")
    suite = pyperf.BenchmarkSuite.load(str(tmp_path / "times.json"))
    assert suite.get_benchmark_names() == ["x: a", "x: b", "x: c"]


def test_a_ratio_is_that_of_one_round() -> None:
    rounds = Rounds("x", {"ours": [1.0, 2.0, 4.0], "slow": [3.0, 4.0, 8.0]}, work=8, unit="episode")
    assert rounds.ratios("slow") == [2.0, 2.0, 3.0] and rounds.ratio("slow") == 2.0
    assert rounds.rate("ours") == 4.0
    assert "| x | slow | 2 episodes | **2.00** (2.00 to 3.00) |" in table([rounds])


def test_a_command_fills_its_own_part_of_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end x -->\nb\n<!-- y -->\n<!-- end y -->\n")
    fill("y", "| 1 |", page)
    fill("x", "new\\1", page)
    assert page.read_text() == "a\n<!-- x -->\nnew\\1\n<!-- end x -->\nb\n<!-- y -->\n| 1 |\n<!-- end y -->\n"
    with pytest.raises(ValueError):
        fill("z", "lost", page)


def test_the_guard_names_what_has_dropped() -> None:
    rounds = [Rounds("x", {"ours": [1.0], "slow": [2.0], "slower": [4.0]})]
    now = ratios_of(rounds)
    assert now == {"x: slow": 2.0, "x: slower": 4.0}
    assert dropped(now, now) == [] == dropped(now, {"x: slow": 2.4})
    assert dropped(now, {"x: slow": 2.6, "y": 1.0}) == ["x: slow: 2.00, was 2.60", "y: 0.00, was 1.00"]
