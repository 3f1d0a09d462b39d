"""A watched episode is the very episode of the plain engine, and its events tell it truly."""

from itertools import groupby
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.engine import Request
from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.prompts import INVALID_ACTION
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, Sampling
from dgpo_core.datasets.records import Question
from dgpo_core.models import load_tokenizer
from dgpo_core.retrieval.index import Index
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.events import Ask, Delta, Event, Information, Notice, Stopped
from dgpo_core.serving.streaming import Narrator, ReportingRetriever, StreamingEngine
from tests.dgpo_core.serving.conftest import FLOAT32, PROTOCOL, TEACHER

Watched = tuple[Episode, list[Event], Narrator]


@pytest.fixture(scope="module")
def engine(teacher: PreTrainedModel) -> StreamingEngine:
    return StreamingEngine(teacher, load_tokenizer(TEACHER), FLOAT32)


def watch(engine: StreamingEngine, index: Index, task: Task, sampling: Sampling) -> Watched:
    events: list[Event] = []
    narrator = Narrator(engine.tokenizer.decode, events.append, lambda: False)
    engine.listener = narrator
    loop = AgentLoop(engine, engine.tokenizer, ReportingRetriever(index, narrator.found), PROTOCOL, 3)
    return loop.run([task], sampling)[0], events, narrator


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8)])
def test_a_watched_episode_is_that_of_the_plain_engine(
    engine: StreamingEngine, index: Index, questions: list[Question], sampling: Sampling
) -> None:
    plain = AgentLoop(
        TransformersEngine(engine.model, engine.tokenizer, FLOAT32), engine.tokenizer, index, PROTOCOL, 3
    )
    tasks = [Task(question, "asked", seed=(5,)) for question in questions[:6]]
    expected = plain.run(tasks, sampling)  # one batch: what an episode is does not depend on its neighbours
    found = [watch(engine, index, task, sampling)[0] for task in tasks]
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids and one.owners == other.owners
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.searches == other.searches
        assert (one.prediction, one.outcome, one.ending) == (other.prediction, other.outcome, other.ending)
    assert sum(len(episode.searches) for episode in found) >= len(tasks)
    assert sampling is not GREEDY or sum(episode.correct for episode in found) >= 3


def test_events_tell_the_episode(engine: StreamingEngine, index: Index, questions: list[Question]) -> None:
    episode, events, narrator = watch(engine, index, Task(questions[1], "asked"), GREEDY)
    deltas = [event for event in events if isinstance(event, Delta)]
    answer = "".join(event.text for event in deltas if event.kind == "answer")
    assert answer.strip() == episode.prediction
    queries = groupby((event for event in deltas if event.kind == "search"), lambda event: event.turn)
    assert ["".join(e.text for e in group).strip() for _, group in queries] == [
        s.query for s in episode.searches
    ]
    informed = [event for event in events if isinstance(event, Information)]
    assert informed == narrator.searches
    assert [[p.id for p in event.passages] for event in informed] == [s.passage_ids for s in episode.searches]
    kinds = [kind for kind, _ in groupby(event.kind for event in events if event.kind != "text")]
    hops = ["think", "search", "information"] * len(informed)
    assert kinds == [*hops, "think", "answer"]
    assert len(deltas) > 3 * len(kinds), "told while it is written, not turn by turn"


def test_a_turn_without_an_action_is_noticed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, index: Index
) -> None:
    wild = StreamingEngine(model, tokenizer, FLOAT32)  # random weights: it knows no tag
    episode, events, _ = watch(wild, index, Task(Question("q", "Who", ()), "asked"), GREEDY)
    notices = [event for event in events if isinstance(event, Notice)]
    assert [notice.turn for notice in notices] == list(range(episode.generations - 1))
    assert notices[0].text == INVALID_ACTION.strip()


def test_characters_of_several_tokens_are_told_whole(tokenizer: Any) -> None:
    text = "<answer> Łódź 東京 🦊 </answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    lost = "\N{REPLACEMENT CHARACTER}"
    half = next(token for token in ids if tokenizer.decode([token]) == lost)
    events: list[Event] = []
    narrator = Narrator(tokenizer.decode, events.append, lambda: False)
    narrator.begin()
    for token in ids:
        narrator.token(token)
    narrator.end()
    texts = [event.text for event in events if isinstance(event, Delta)]
    assert "".join(texts) == " Łódź 東京 🦊 "
    assert not any(lost in text for text in texts)
    narrator.begin()
    narrator.token(half)
    narrator.end()
    assert isinstance(events[-1], Delta) and events[-1].text == lost, "the rest never came"


def test_it_stops_at_the_next_token(agent: Agent, questions: list[Question]) -> None:
    events: list[Event] = []
    with pytest.raises(Stopped):
        agent.ask(Ask(questions[0].question), events.append, lambda: len(events) >= 3)
    assert len(events) == 3
    assert agent.ask(Ask(questions[0].question), events.append, lambda: False).answer, "and is ready again"


def test_more_than_one_request_is_refused(engine: StreamingEngine) -> None:
    with pytest.raises(ValueError, match="one request at a time, not 2"):
        engine.generate([Request([1], 1, (0,))] * 2, GREEDY, ("x",))
