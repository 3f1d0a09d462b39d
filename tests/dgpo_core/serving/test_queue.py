"""In order, as many together as may be; who leaves or is too late costs nobody anything."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from dgpo_core.agent.episode import Episode
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.retrieval.index import Index
from dgpo_core.serving.agent import Agent, Asked
from dgpo_core.serving.events import (
    AgentRequest,
    EpisodeCancelled,
    EpisodeEnd,
    EpisodeRecord,
    Event,
    QueuePosition,
)
from dgpo_core.serving.queue import NotReady, QueuedRequest, QueueFull, RequestQueue
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import Gate, MakeAgent

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def ask(questions: list[Question]) -> AgentRequest:
    return AgentRequest(questions[0].question)


@pytest.fixture
def loading(gate: Gate) -> Iterator[RequestQueue]:
    made = RequestQueue(limit=2)
    yield made
    gate.opened.set()
    made.shutdown()


@pytest.fixture
async def queue(loading: RequestQueue, make_agent: MakeAgent, gate: Gate) -> RequestQueue:
    """With an agent whose episodes wait at the gate."""
    await loading.open(lambda: make_agent(gate))
    return loading


async def disconnected() -> bool:
    return True


async def connected() -> bool:
    return False


async def told(request: QueuedRequest) -> list[Event]:
    async with asyncio.timeout(30):
        return [event async for event in request.events(connected)]


def ahead(events: list[Event]) -> list[int]:
    return [event.ahead for event in events if isinstance(event, QueuePosition)]


async def test_in_order_and_each_knows_its_place(queue: RequestQueue, gate: Gate, ask: AgentRequest) -> None:
    requests = [queue.submit(ask) for _ in range(3)]
    assert queue.waiting == 2
    with pytest.raises(QueueFull):
        queue.submit(ask)
    gate.opened.set()
    first, second, third = await asyncio.gather(*map(told, requests))
    assert (ahead(first), ahead(second), ahead(third)) == ([], [1, 0], [2, 1, 0])
    assert isinstance(first[-1], EpisodeEnd) and first[-1] == second[-1] == third[-1]
    await asyncio.sleep(0.05)
    assert queue.waiting == 0


async def test_who_leaves_ends_its_episode_and_gives_up_its_place(
    queue: RequestQueue, gate: Gate, ask: AgentRequest
) -> None:
    first, second, third = (queue.submit(ask) for _ in range(3))
    second.cancel()
    with pytest.raises(EpisodeCancelled):
        await told(second)
    await asyncio.sleep(0.05)
    assert queue.waiting == 1, "it never began"
    first.cancel()
    gate.opened.set()
    with pytest.raises(EpisodeCancelled):
        await told(first)
    assert ahead(await told(third)) == [2, 1, 0]
    assert gate.calls <= 2, "of the first, if it came so far, and of the third"


async def test_a_client_that_is_gone_is_noticed(queue: RequestQueue, ask: AgentRequest) -> None:
    request = queue.submit(ask)
    with pytest.raises(EpisodeCancelled):
        [event async for event in request.events(disconnected)]
    assert request.cancelled


async def test_what_an_episode_raises_reaches_its_client_and_no_other(
    queue: RequestQueue, gate: Gate, ask: AgentRequest
) -> None:
    gate.opened.set()
    wrong, right = queue.submit(AgentRequest(" ")), queue.submit(ask)
    with pytest.raises(UserError, match="empty"):
        await told(wrong)
    assert isinstance((await told(right))[-1], EpisodeEnd)


async def test_before_loading_no_request_is_taken(loading: RequestQueue, ask: AgentRequest) -> None:
    with pytest.raises(NotReady):
        loading.submit(ask)


async def test_after_closing_no_request_is_taken(queue: RequestQueue, gate: Gate, ask: AgentRequest) -> None:
    requests = [queue.submit(ask), queue.submit(ask)]
    queue.close()
    gate.opened.set()
    for request in requests:
        with pytest.raises(EpisodeCancelled):
            await told(request)
    with pytest.raises(NotReady):
        queue.submit(ask)


@pytest.mark.thorough
async def test_many_run_together_with_the_answers_of_each_alone(
    make_agent: MakeAgent, index: Index, questions: list[Question]
) -> None:
    agent = make_agent(index)
    asked = [AgentRequest(question.question) for question in questions[:12]]
    alone = [agent.ask(request, lambda _: None, lambda: False) for request in asked]
    together = RequestQueue(limit=4, together=8)
    await together.open(lambda: agent)
    try:
        requests = [together.submit(request) for request in asked]
        assert together.waiting == 4
        events = await asyncio.gather(*map(told, requests))
    finally:
        together.shutdown()
    assert [ahead(each) for each in events[:8]] == [[]] * 8
    assert all(ahead(each)[-1] == 0 for each in events[8:])
    for record, each in zip(alone, events, strict=True):
        assert isinstance(each[-1], EpisodeEnd)
        assert each[-1].episode == record


async def test_a_slow_search_holds_nobody_else_up(make_agent: MakeAgent, questions: list[Question]) -> None:
    """Who searches waits; who joins meanwhile and needs no search is answered."""
    gate = Gate()
    agent = make_agent(gate)
    together = RequestQueue(limit=0, together=2)
    await together.open(lambda: agent)
    try:
        slow = together.submit(AgentRequest(questions[0].question))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        quick = together.submit(AgentRequest(questions[1].question, max_searches=0))
        assert isinstance((await told(quick))[-1], EpisodeEnd)
        assert not gate.calls
        gate.opened.set()
        assert isinstance((await told(slow))[-1], EpisodeEnd)
    finally:
        gate.opened.set()
        together.shutdown()


async def test_a_slow_record_holds_nobody_else_up(
    make_agent: MakeAgent, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may have to search for words that no passage had."""
    agent, released = make_agent(Answering()), threading.Event()
    slow, quick = (AgentRequest(question.question) for question in questions[:2])

    def record(asked: Asked, episode: Episode) -> EpisodeRecord:
        assert asked.request != slow or released.wait(30)
        return Agent.record(agent, asked, episode)

    monkeypatch.setattr(agent, "record", record)
    together = RequestQueue(limit=0, together=2)
    await together.open(lambda: agent)
    try:
        waits, goes = together.submit(slow), together.submit(quick)
        assert isinstance((await told(goes))[-1], EpisodeEnd)
        released.set()
        assert isinstance((await told(waits))[-1], EpisodeEnd)
    finally:
        released.set()
        together.shutdown()
