"""One agent: its record against the episode's own text, its sources, and what it refuses."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from dgpo_core.agent.episode import Ending
from dgpo_core.datasets.records import Passage, Question
from dgpo_core.errors import UserError
from dgpo_core.models import load_tokenizer
from dgpo_core.serving.agent import Agent, sources
from dgpo_core.serving.events import AgentRequest, EpisodeRecord, Event, RetrievedPassage, SearchResult
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import TEACHER, MakeAgent

Emit = Callable[[Event], None]


def ask(agent: Agent, question: str, emit: Emit = lambda _: None, **how: Any) -> EpisodeRecord:
    """The record of an episode that nobody stops; nobody hears its events either, but `emit`."""
    return agent.ask(AgentRequest(question, **how), emit, lambda: False)


def test_steps_are_the_text_of_the_episode(agent: Agent, questions: list[Question]) -> None:
    record = ask(agent, questions[1].question)
    tags = re.findall(r"<(think|search|information|answer)>(.*?)</\1>", record.response, re.DOTALL)
    assert [(step.kind, step.text) for step in record.steps] == [(tag, text.strip()) for tag, text in tags]
    assert record.answer == tags[-1][1].strip() and record.ending is Ending.ANSWERED
    assert len(record.searches) == sum(tag == "search" for tag, _ in tags) >= 1
    assert (record.failure, record.well_formed, record.invalid_actions) == (None, True, 0)
    tokens = load_tokenizer(TEACHER).encode(record.response, add_special_tokens=False)
    assert len(tokens) <= record.model_tokens + record.other_tokens + 5


def test_the_passages_with_the_answer_are_its_sources(agent: Agent, questions: list[Question]) -> None:
    asked = [(question, ask(agent, question.question)) for question in questions[:4]]
    right = [(q, record) for q, record in asked if record.answer in q.golden_answers]
    assert right, "the committed teacher answers some of these"
    for question, record in right:
        golden = {passage["id"] for passage in question.metadata["golden_passages"]}
        assert golden & {source.id for source in record.sources}
        assert [source.number for source in record.sources] == list(range(1, len(record.sources) + 1))


def found(*texts: str) -> list[SearchResult]:
    passages = [RetrievedPassage(id=str(i), title="T", text=text, score=1.0) for i, text in enumerate(texts)]
    return [SearchResult(turn=turn, query="q", passages=passages) for turn in (0, 1)]


@pytest.mark.parametrize(
    ("answer", "ids"),
    [
        ("Ann", ["1"]),  # not in "annual"; the second search's same passages count once
        ("the ANN!", ["1"]),
        ("annual report", ["0"]),
        ("Bea", []),
        ("the", []),  # nothing is left of it
        (None, []),
        ("Jose\u0301", ["2"]),
        ("Jo\u200bsé", ["2"]),
        ("東京", ["3"]),
    ],
)
def test_sources_hold_the_answer_as_whole_words(answer: str | None, ids: list[str]) -> None:
    searches = found("The annual report.", "It was Ann's, or so said Ann.", "By José.", "首都は東京です")
    assert [source.id for source in sources(answer, searches)] == ids


def test_limits_are_the_protocols_and_may_be_lowered(agent: Agent, questions: list[Question]) -> None:
    question = questions[0].question
    record = ask(agent, question, max_searches=0)
    assert (record.answer, record.ending, record.searches) == (None, Ending.BUDGET, [])
    short = ask(agent, question, max_new_tokens=5, max_searches=0)
    assert short.model_tokens == 5
    longer = ask(agent, question, max_new_tokens=5000)
    assert longer == ask(agent, question)
    with pytest.raises(UserError, match=r"between 0 and protocol\.max_turns \(4\), not 5"):
        ask(agent, question, max_searches=5)


def test_temperature_and_seed_reach_the_episode(agent: Agent, questions: list[Question]) -> None:
    how: dict[str, Any] = {"temperature": 4.0, "max_searches": 0, "max_new_tokens": 12}
    seeds = (1, 2, 3, 1, 2, 3)
    texts = [ask(agent, questions[0].question, seed=seed, **how).response for seed in seeds]
    assert texts[:3] == texts[3:] and len(set(texts)) == 3


@pytest.mark.parametrize(
    ("question", "message"), [(" \n", "the question is empty"), ("Who " * 2000, "the question is too long")]
)
def test_impossible_questions_are_refused(agent: Agent, question: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(agent, question)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_impossible_temperatures_are_refused(agent: Agent, temperature: float) -> None:
    with pytest.raises(UserError, match="temperature: a number from 0 upwards"):
        ask(agent, "Who", temperature=temperature)


@pytest.mark.usefixtures("no_pauses")
def test_a_dead_retriever_gives_a_failure(make_agent: MakeAgent, questions: list[Question]) -> None:
    retriever = Answering(failures=99)
    record = ask(make_agent(retriever), questions[0].question)
    assert (record.answer, record.ending, record.sources) == (None, Ending.FAILURE, [])
    assert record.failure == "the index is down" and retriever.calls == 3


@pytest.mark.usefixtures("no_pauses")
def test_a_short_failure_is_told_once(make_agent: MakeAgent, questions: list[Question]) -> None:
    retriever = Answering([Passage("7", "Ada", "Ada was born in Paris.")], failures=1)
    events: list[Event] = []
    record = ask(make_agent(retriever), questions[0].question, events.append)
    assert record.failure is None
    assert [event for event in events if isinstance(event, SearchResult)] == record.searches
