"""The agent's tools, called by the official client: in this process, and over HTTP."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from dgpo_core.datasets.records import Question
from dgpo_core.serving.access import restrict
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.events import AgentRequest
from dgpo_core.serving.queue import RequestQueue
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import MakeAgent

mcp = pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
mcp_server = pytest.importorskip("dgpo_core.serving.mcp_server")
answer_of, make_server = mcp_server.answer_of, mcp_server.make_server

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def queue() -> RequestQueue:
    return RequestQueue(limit=2)


async def test_ask_answers_with_sources_and_tells_of_searches(
    agent: Agent, queue: RequestQueue, questions: list[Question]
) -> None:
    asked = questions[1].question
    record = agent.ask(AgentRequest(asked), lambda event: None, lambda: False)
    queue.agent = agent
    told: list[str | None] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append(message)

    async with mcp.Client(make_server(queue)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"ask", "search"}
        assert list(tools["ask"].input_schema["properties"]) == ["question"]
        result = await client.call_tool("ask", {"question": asked}, progress_callback=progress)
    assert not result.is_error
    assert result.structured_content == answer_of(record).model_dump(mode="json")
    assert result.structured_content["searches"] == [search.query for search in record.searches]
    assert {source["id"] for source in result.structured_content["sources"]} == {s.id for s in record.sources}
    assert told == [f"searched for {search.query}" for search in record.searches]


async def test_search_returns_whole_passages(agent: Agent, queue: RequestQueue) -> None:
    queue.agent = agent
    async with mcp.Client(make_server(queue)) as client:
        found = (await client.call_tool("search", {"query": "film", "count": 2})).structured_content
        assert [passage["id"] for passage in found["passages"]] == [hit.id for hit in agent.search("film", 2)]
        assert (await client.call_tool("search", {"query": "film", "count": 99})).is_error
        assert (await client.call_tool("search", {"query": " "})).is_error


@pytest.mark.usefixtures("no_pauses")
async def test_failures_are_told_in_words(
    make_agent: MakeAgent, queue: RequestQueue, questions: list[Question]
) -> None:
    server = make_server(queue)
    async with mcp.Client(server) as client:

        async def refused(question: str) -> str:
            result = await client.call_tool("ask", {"question": question})
            assert result.is_error
            return str(result.content[0].text)

        assert "model and index are not loaded" in await refused("Who?")
        queue.agent = make_agent(Answering(failures=99))
        assert "the question is empty" in await refused(" ")
        assert "the index is down" in await refused(questions[0].question)


async def test_calls_wait_for_the_model_and_hear_why_it_does_not_come(
    agent: Agent, questions: list[Question]
) -> None:
    queue = RequestQueue(limit=2)
    async with mcp.Client(make_server(queue)) as client:
        opening = asyncio.create_task(queue.open(lambda: agent))
        await asyncio.sleep(0)
        assert not (await client.call_tool("search", {"query": "film"})).is_error
        await opening
    broken = RequestQueue(limit=2)

    def fail() -> Agent:
        raise OSError("inside")

    async with mcp.Client(make_server(broken)) as client:
        with pytest.raises(OSError):
            await broken.open(fail)
        result = await client.call_tool("ask", {"question": questions[0].question})
    assert result.is_error and "its log says more" in result.content[0].text
    broken.shutdown()
    queue.shutdown()


def test_what_speaks_against_an_answer_is_noted(agent: Agent, questions: list[Question]) -> None:
    record = agent.ask(AgentRequest(questions[0].question), lambda event: None, lambda: False)
    assert (
        answer_of(record.model_copy(update={"answer": None, "sources": []})).note
        == "the agent gave no answer"
    )
    bare = record.model_copy(update={"sources": [], "answer": "x"})
    assert answer_of(bare).note == "no retrieved passage contains this answer"
    unknown = bare.model_copy(update={"unknown_words": ["Marie"]})
    assert answer_of(unknown).note == "no passage that was found has Marie"


@contextmanager
def over_http(queue: RequestQueue, key: str | None = None) -> Iterator[str]:
    """The address of the server on a port of this machine, in a thread."""
    app = make_server(queue).streamable_http_app(host="0.0.0.0")
    restrict(app, "127.0.0.1", key=key)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/mcp"
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_over_http(agent: Agent, queue: RequestQueue, questions: list[Question], mode: str) -> None:
    """By the protocol of now, and by that of clients which begin with a handshake."""
    record = agent.ask(AgentRequest(questions[0].question), lambda event: None, lambda: False)
    queue.agent = agent
    with over_http(queue) as url:
        async with mcp.Client(url, mode=mode) as client:
            result = await client.call_tool("ask", {"question": questions[0].question})
            assert result.structured_content == answer_of(record).model_dump(mode="json")
    queue.shutdown()


def test_http_asks_for_the_key_and_for_this_machines_name(queue: RequestQueue) -> None:
    with over_http(queue, key="secret") as url:
        assert httpx.post(url, json={}).status_code == 401
        known = {"Authorization": "Bearer secret"}
        foreign = httpx.post(url, json={}, headers={**known, "Host": "evil.example"})
        assert foreign.json()["error"]["code"] == "host_not_allowed"
        assert httpx.post(url, json={}, headers=known).status_code not in (401, 403, 404)
