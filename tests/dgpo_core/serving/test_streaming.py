"""A watched episode is the very episode of the plain engine, and its events tell it truly.

Kinds of a text do not depend on how it is cut into chunks; the oracle splits the whole text.
"""

import re
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode
from dgpo_core.agent.loop import AgentLoop, Task
from dgpo_core.agent.prompts import INVALID_ACTION, TAGS
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, Sampling
from dgpo_core.datasets.records import Question
from dgpo_core.models import load_tokenizer
from dgpo_core.retrieval.index import Index
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.events import AgentRequest, Delta, EpisodeCancelled, Event, Notice, SearchResult
from dgpo_core.serving.streaming import EventStream, Piece, TagSplitter
from tests.dgpo_core.serving.conftest import FLOAT32, PROTOCOL, TEACHER

Watched = tuple[Episode, list[Event], EventStream]


@pytest.fixture(scope="module")
def engine(teacher: PreTrainedModel) -> TransformersEngine:
    return TransformersEngine(teacher, load_tokenizer(TEACHER), FLOAT32)


def watch(engine: TransformersEngine, index: Index, task: Task, sampling: Sampling) -> Watched:
    events: list[Event] = []
    eos = engine.stop_criteria.eos
    stream = EventStream(engine.tokenizer.decode, eos, events.append, lambda: False)
    loop = AgentLoop(engine, engine.tokenizer, index, PROTOCOL, 3)
    return loop.run([replace(task, watcher=stream)], sampling)[0], events, stream


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8)])
def test_a_watched_episode_is_that_of_the_plain_engine(
    engine: TransformersEngine, index: Index, questions: list[Question], sampling: Sampling
) -> None:
    plain = AgentLoop(engine, engine.tokenizer, index, PROTOCOL, 3)
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


def test_events_tell_the_episode(engine: TransformersEngine, index: Index, questions: list[Question]) -> None:
    episode, events, stream = watch(engine, index, Task(questions[1], "asked"), GREEDY)
    deltas = [event for event in events if isinstance(event, Delta)]
    answer = "".join(event.text for event in deltas if event.kind == "answer")
    assert answer.strip() == episode.prediction
    queries = groupby((event for event in deltas if event.kind == "search"), lambda event: event.turn)
    assert ["".join(e.text for e in group).strip() for _, group in queries] == [
        s.query for s in episode.searches
    ]
    informed = [event for event in events if isinstance(event, SearchResult)]
    assert informed == stream.searches
    assert [[p.id for p in event.passages] for event in informed] == [s.passage_ids for s in episode.searches]
    kinds = [kind for kind, _ in groupby(event.kind for event in events if event.kind != "text")]
    hops = ["think", "search", "information"] * len(informed)
    assert kinds == [*hops, "think", "answer"]
    assert len(deltas) > 3 * len(kinds), "told while it is written, not turn by turn"


def test_a_turn_without_an_action_is_noticed(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, index: Index
) -> None:
    wild = TransformersEngine(model, tokenizer, FLOAT32)  # random weights: it knows no tag
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
    stream = EventStream(tokenizer.decode, (), events.append, lambda: False)
    stream.begin_turn()
    for token in ids:
        stream.token(token)
    stream.end_turn()
    texts = [event.text for event in events if isinstance(event, Delta)]
    assert "".join(texts) == " Łódź 東京 🦊 "
    assert not any(lost in text for text in texts)
    stream.begin_turn()
    stream.token(half)
    stream.end_turn()
    assert isinstance(events[-1], Delta) and events[-1].text == lost, "the rest never came"


def test_it_stops_at_the_next_token(agent: Agent, questions: list[Question]) -> None:
    events: list[Event] = []
    with pytest.raises(EpisodeCancelled):
        agent.ask(AgentRequest(questions[0].question), events.append, lambda: len(events) >= 3)
    assert len(events) == 3
    assert agent.ask(AgentRequest(questions[0].question), events.append, lambda: False).answer, (
        "and is ready again"
    )


FRAGMENTS = st.sampled_from(
    [*TAGS, "<", ">", "</", "<thin", "</answer", "think>", "<b>", " a ", "<<search>", "é"]
)
KINDS = {"think": "think", "search": "search", "answer": "answer", "information": "forged"}


def whole(text: str) -> list[tuple[str, str]]:
    """Kind and text between two tags, without empty ones."""
    kind, pieces = "text", []
    for part in re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text):
        if part in TAGS:
            kind = "text" if part.startswith("</") else KINDS[part.strip("<>")]
        elif part:
            pieces.append((kind, part))
    return pieces


def split(chunks: list[str]) -> list[Piece]:
    splitter = TagSplitter()
    return [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.close()


@given(st.lists(FRAGMENTS, max_size=12).map("".join), st.lists(st.integers(0, 60), max_size=12))
def test_any_chunking_gives_the_kinds_of_the_whole_text(text: str, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    chunks = [text[start:end] for start, end in pairwise(ends)]
    expected = whole(text)
    for cut in (chunks, [text], list(text)):
        pieces = split(cut)
        assert not any(tag in piece for _, piece in pieces for tag in TAGS)
        assert merged(pieces) == merged(expected)


def merged(pieces: list[Piece] | list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(pieces, lambda p: p[0])]


def test_only_what_may_become_a_tag_is_held_back() -> None:
    splitter = TagSplitter()
    assert splitter.feed("<answer>5 < 7 and 7 <") == [("answer", "5 < 7 and 7 ")]
    assert splitter.feed("b") == [("answer", "<b")]
    assert splitter.feed("</answe") == []
    assert splitter.close() == [("answer", "</answe")], "the turn ended here: it was none"
