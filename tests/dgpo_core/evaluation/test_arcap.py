"""ARCap on scripted episodes."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Outcome, Search
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.config.agent import GREEDY, ProtocolConfig
from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.arcap import (
    as_table,
    gold_context,
    query_rewriting,
    source_referencing,
    thinking,
)
from dgpo_core.world.facts import World
from dgpo_core.world.questions import Article, write_questions
from tests.dgpo_core.agent.scripted import Answering, ScriptedEngine
from tests.dgpo_core.making import random_episode

GOLDEN = [{"id": "1", "title": "A", "text": "a"}, {"id": "2", "title": "B", "text": "b"}]


@pytest.mark.parametrize(
    ("role", "metadata", "expected"),
    [
        ("nq", {"golden_passages": GOLDEN, "long_answers": ["b"]}, [("B", "b")]),
        ("nq", {"long_answers": ["elsewhere", "b"]}, [("", "elsewhere")]),
        ("nq", {"golden_passages": GOLDEN}, [("A", "a"), ("B", "b")]),
        ("musique", {"golden_passages": GOLDEN, "long_answers": ["b"]}, [("A", "a"), ("B", "b")]),
        ("nq", {}, []),
        ("nq", {"long_answers": []}, []),
        ("musique", {"long_answers": ["a"]}, []),
    ],
)
def test_gold_context(role: str, metadata: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert gold_context(Question("q", "Who?", ("x",), metadata), role) == expected


def test_embedded_questions_have_their_context(world: World, articles: list[Article]) -> None:
    made = write_questions(world, articles)
    for question in made["onehop", "test"]:
        ((title, text),) = gold_context(question, "nq")
        assert question.golden_answers[0] in text
        assert title == question.metadata["golden_passages"][0]["title"]
    for question in made["threehop", "test"]:
        context = gold_context(question, "musique")
        assert 1 <= len(context) <= 3
        assert question.golden_answers[0] in " ".join(text for _, text in context)


def test_source_referencing(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that answers right only when its answer is forced, and searches otherwise."""
    questions = [Question(f"q{i}", "Who?", ("Ada",), {"golden_passages": GOLDEN}) for i in range(2)]
    questions.insert(1, Question("without a gold context", "Who?", ("Ada",)))
    asked: dict[str, list[Task]] = {}

    def run(tasks: list[Task], name: str) -> list[Episode]:
        asked[name] = tasks
        forced = tasks[0].opening.endswith("<answer>")
        engine = ScriptedEngine(
            tokenizer, lambda _, turn: " Ada </answer>" if forced else "<search> Ada </search>"
        )
        return AgentLoop(engine, tokenizer, Answering(), ProtocolConfig(), 3).run(tasks, GREEDY)

    rows = source_referencing("nq", "onehop", questions, 0, run)
    assert [(row.measurement, row.question_id, row.value, row.failed) for row in rows] == [
        ("source_em_nq", "q0", 1.0, False),
        ("source_em_nq", "q1", 1.0, False),
        ("source_em_nq_thinking", "q0", 0.0, False),
        ("source_em_nq_thinking", "q1", 0.0, False),
    ]
    assert asked["source_em_nq"][0].opening.endswith("</information>\n\n<answer>")
    assert asked["source_em_nq_thinking"][0].opening.endswith("</information>\n\n")
    assert as_table(rows).column_names == ["measurement", "question_id", "value", "failed"]


def test_query_rewriting_and_thinking() -> None:
    miss, hit = Search("a", ["1"], [1.0], hit=False), Search("b", ["2"], [1.0], hit=True)
    base = random_episode(0, correct=True)
    episodes = [
        replace(base, question_id="late", searches=[miss, hit], hit=True),
        replace(base, question_id="first", searches=[hit, miss, miss], hit=True),
        replace(base, question_id="none", response="<search> in an instruction </search>"),
        replace(base, question_id="failed", outcome=Outcome.FAILED),
    ]
    assert [(row.value, row.failed) for row in query_rewriting("nq", episodes)] == [
        (0.0, False), (1.0, False), (0.0, False), (0.0, True)
    ]  # fmt: skip
    rows = thinking("musique", episodes)
    values = {(row.measurement, row.question_id): row.value for row in rows}
    assert [values["thinking_hit_musique", name] for name in ("late", "first", "none")] == [1, 1, 0]
    assert [values["thinking_searches_musique", name] for name in ("late", "first", "none")] == [2, 3, 0]
    assert sum(row.failed for row in rows) == 2
