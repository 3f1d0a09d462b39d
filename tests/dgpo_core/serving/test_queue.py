"""One episode at a time, in order; who leaves or is too late costs nobody anything."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest
from transformers import PreTrainedModel

from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.models import load_tokenizer
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.events import AgentRequest, EpisodeCancelled, EpisodeEnd, Event, QueuePosition
from dgpo_core.serving.queue import NotReady, QueuedRequest, QueueFull, RequestQueue
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import FLOAT32, PROTOCOL, TEACHER


class Gate(Answering):
    """Answers a search when the gate is open: so an episode can be held under way."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()

    def search(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        assert self.opened.wait(20)
        return super().search(queries, top_k)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def held(teacher: PreTrainedModel, gate: Gate) -> Agent:
    return Agent("teacher", teacher, load_tokenizer(TEACHER), gate, PROTOCOL, FLOAT32, 3)


@pytest.fixture
def ask(questions: list[Question]) -> AgentRequest:
    return AgentRequest(questions[0].question)


@pytest.fixture
def queue() -> Iterator[RequestQueue]:
    made = RequestQueue(limit=2)
    yield made
    made.shutdown()


async def here() -> bool:
    return False


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(scenario(), 30)

    asyncio.run(limited())


async def told(request: QueuedRequest) -> list[Event]:
    return [event async for event in request.events(here)]


def ahead(events: list[Event]) -> list[int]:
    return [event.ahead for event in events if isinstance(event, QueuePosition)]


def test_in_order_and_each_knows_its_place(
    queue: RequestQueue, held: Agent, gate: Gate, ask: AgentRequest
) -> None:
    async def scenario() -> None:
        await queue.open(lambda: held)
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

    run(scenario)


def test_who_leaves_ends_its_episode_and_gives_up_its_place(
    queue: RequestQueue, held: Agent, gate: Gate, ask: AgentRequest
) -> None:
    async def scenario() -> None:
        await queue.open(lambda: held)
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

    run(scenario)


def test_a_client_that_is_gone_is_noticed(
    queue: RequestQueue, held: Agent, gate: Gate, ask: AgentRequest
) -> None:
    async def gone() -> bool:
        return True

    async def scenario() -> None:
        await queue.open(lambda: held)
        request = queue.submit(ask)
        with pytest.raises(EpisodeCancelled):
            [event async for event in request.events(gone)]
        assert request.cancelled

    run(scenario)
    gate.opened.set()


def test_what_an_episode_raises_reaches_its_visitor_and_no_other(
    queue: RequestQueue, held: Agent, gate: Gate, ask: AgentRequest
) -> None:
    async def scenario() -> None:
        await queue.open(lambda: held)
        gate.opened.set()
        wrong, right = queue.submit(AgentRequest(" ")), queue.submit(ask)
        with pytest.raises(UserError, match="empty"):
            await told(wrong)
        assert isinstance((await told(right))[-1], EpisodeEnd)

    run(scenario)


def test_before_loading_and_after_closing_nobody_is_admitted(
    queue: RequestQueue, held: Agent, gate: Gate, ask: AgentRequest
) -> None:
    async def scenario() -> None:
        with pytest.raises(NotReady):
            queue.submit(ask)
        await queue.open(lambda: held)
        requests = [queue.submit(ask), queue.submit(ask)]
        queue.close()
        gate.opened.set()
        for request in requests:
            with pytest.raises(EpisodeCancelled):
                await told(request)
        with pytest.raises(NotReady):
            queue.submit(ask)

    run(scenario)
