"""The service over real HTTP: OpenAI's documented fields, errors in OpenAI's shape, clients that leave."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from dgpo_core.datasets.records import Question
from dgpo_core.serving.agent import Agent, Asked
from dgpo_core.serving.events import AgentRequest, Event
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import Gate, MakeAgent
from tests.dgpo_core.serving.service import serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[httpx.Client]:
    with serving(agent) as made:
        yield made


def body(question: str = "Who", **more: Any) -> dict[str, Any]:
    return {"model": "teacher", "messages": [{"role": "user", "content": question}], **more}


def streamed(client: httpx.Client, **request: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, whose last line must be [DONE]."""
    with client.stream("POST", CHAT, json=body(stream=True, **request)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def told(client: httpx.Client, **changes: Any) -> tuple[int, dict[str, Any]]:
    """Status and error of a refused request."""
    response = client.post(CHAT, json=body() | changes)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error


def test_a_whole_answer(client: httpx.Client, agent: Agent, questions: list[Question]) -> None:
    asked = questions[0].question
    done = client.post(CHAT, json=body(asked)).json()
    assert done["object"] == "chat.completion" and done["model"] == "teacher"
    assert done["id"].startswith("chatcmpl-") and abs(done["created"] - time.time()) < 60
    (choice,) = done["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    record = agent.ask(AgentRequest(asked), lambda event: None, lambda: False)
    assert done["episode"] == record.model_dump(mode="json")
    assert choice["message"]["content"] == record.answer
    usage = done["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
    assert usage["completion_tokens"] == record.model_tokens


def test_a_stream_puts_together_the_same_answer(client: httpx.Client, questions: list[Question]) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": questions[1].question}]}]
    whole = client.post(CHAT, json=body() | {"messages": asked}).json()
    *chunks, last = streamed(client, messages=asked, stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert finishes[-1] == "stop" and not any(finishes[:-1])
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    events = [chunk["event"] for chunk in chunks if "event" in chunk]
    assert {"think", "search", "information", "answer"} <= {event["kind"] for event in events}
    assert events[-1] == {"kind": "finished", "episode": whole["episode"]}


def test_models_health_and_what_there_is_not(client: httpx.Client, agent: Agent) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("teacher", "model") and isinstance(model["created"], int)
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ready", "model": "teacher", "index": agent.index, "waiting": 0}
    missing = client.get("/v1/nothing")
    assert missing.status_code == 404 and missing.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "only [], not"),
        ({"tool_choice": "required"}, "tool_choice", "only 'none' or 'auto'"),
        ({"stop": ["x"]}, "stop", "not ['x']"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "only {}"),
        ({"modalities": ["text", "audio"]}, "modalities", "only [] or ['text']"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"logprobs": True}, "logprobs", "only False"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages",
         "message 1: this agent reads parts of type text only, not 'image_url'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "message 1: content must be a text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages", "messages.0.role"),
        ({"n": 2}, "n", "only 1, not 2"),
        ({"top_p": 0.5}, "top_p", "only 1, not 0.5"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than 0"),
        ({"messages": []}, "messages", "one message must have the role user"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "must have the role user"),
        ({"messages": [{"role": "user", "content": ""}]}, None, "the question is empty"),
        ({"messages": [{"role": "user", "content": "Who " * 3000}], "stream": True}, None, "too long"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said(
    client: httpx.Client, changes: dict[str, Any], param: str | None, message: str
) -> None:
    status, error = told(client, **changes)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def test_half_a_character_is_refused(client: httpx.Client) -> None:
    response = client.post(
        CHAT, content=json.dumps(body("\ud800")), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400 and "not valid Unicode" in response.json()["error"]["message"]
    unknown = client.post(
        CHAT, content=json.dumps(body("Who?", **{"\udc00": 1})), headers={"Content-Type": "application/json"}
    )
    assert unknown.status_code == 400
    assert "retry-after" not in unknown.headers


@pytest.mark.parametrize(
    "changes",
    [{"seed": 10**40}, {"max_tokens": 10**40}, {"temperature": 1e-320}, {"seed": 2**64, "temperature": 1}],
)
def test_numbers_of_any_size_are_answered(
    client: httpx.Client, questions: list[Question], changes: dict[str, Any]
) -> None:
    response = client.post(CHAT, json=body(questions[0].question, **changes))
    assert response.status_code in (200, 400), response.text


def test_what_does_not_change_an_answer_is_ignored_and_named(
    client: httpx.Client, questions: list[Question]
) -> None:
    asked = questions[0].question
    plain = client.post(CHAT, json=body(asked))
    assert "x-ignored-parameters" not in plain.headers
    more = {"chat_id": "a", "session_id": "b", "service_tier": "auto", "reasoning_effort": None}
    done = client.post(
        CHAT, json=body(asked, **more, metadata={"a": 1}, store=True, **{"na\u00efve\r\nx": 1})
    )
    assert done.json()["episode"] == plain.json()["episode"]
    named = "chat_id, session_id, service_tier, metadata, store, na\\xefve\\r\\nx"
    assert done.headers["x-ignored-parameters"] == named
    with client.stream("POST", CHAT, json=body(asked, stream=True, chat_id="a")) as stream:
        assert stream.headers["x-ignored-parameters"] == "chat_id"


def test_another_model_is_not_found(client: httpx.Client) -> None:
    status, error = told(client, model="gpt")
    assert (status, error["code"]) == (404, "model_not_found") and "'teacher'" in error["message"]
    assert client.post(CHAT, json=body() | {"model": "\u2028gpt"}).json()["error"]["param"] == "model"
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    assert client.get("/v1/models/teacher").json() == client.get("/v1/models").json()["data"][0]


def test_no_answer_is_no_text(client: httpx.Client, questions: list[Question]) -> None:
    done = client.post(CHAT, json=body(questions[0].question, max_tokens=1)).json()
    (choice,) = done["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")


def test_a_page_elsewhere_cannot_ask(client: httpx.Client) -> None:
    """Neither by a name of its own for this machine, nor by a form, which cannot send JSON."""
    foreign = client.post(CHAT, json=body(), headers={"Host": "evil.example:80"})
    error = foreign.json()["error"]
    assert (foreign.status_code, error["code"]) == (400, "host_not_allowed")
    assert "not to 'evil.example'" in error["message"] and "--allow-host" in error["message"]
    plain = client.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400
    assert "access-control-allow-origin" not in client.post(CHAT, json=body(" ")).headers


def test_hosts_and_origins_that_are_allowed(agent: Agent) -> None:
    page = "http://localhost:3000"
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    with serving(agent, hosts=("Host.Docker.Internal",), origins=(page,)) as client:
        for host in ("host.docker.internal:8080", "localhost", "[::1]:8080"):
            assert client.get("/health", headers={"Host": host}).status_code == 200, host
        assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
        preflight = client.options(CHAT, headers={"Origin": page, **asks})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page
        assert "content-type" in preflight.headers["access-control-allow-headers"]
        answer = client.post(CHAT, json=body(" "), headers={"Origin": page})
        assert answer.headers["access-control-allow-origin"] == page
        assert answer.headers["access-control-expose-headers"] == "X-Ignored-Parameters"
        other = client.options(CHAT, headers={"Origin": "http://evil.example", **asks})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_while_loading_it_says_so() -> None:
    with serving(None) as client:
        assert client.get("/health").status_code == 503
        assert client.get("/").status_code == 200
        response = client.post(CHAT, json=body())
        assert response.status_code == 503 and response.json()["error"]["code"] == "not_ready"
        assert int(response.headers["retry-after"]) > 0
        assert client.get("/v1/models").json()["data"] == []
        assert client.get("/v1/models/teacher").status_code == 503


@pytest.mark.usefixtures("no_pauses")
def test_a_dead_retriever_is_no_answer(make_agent: MakeAgent, questions: list[Question]) -> None:
    with serving(make_agent(Answering(failures=99))) as client:
        response = client.post(CHAT, json=body(questions[0].question))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (503, "infrastructure_failure")
        assert "the index is down" in error["message"]
        *chunks, last = streamed(client, messages=body(questions[0].question)["messages"])
        assert last == {"error": error}, "the official client raises it"
        assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)


def test_a_bug_tells_nothing_of_the_inside(
    make_agent: MakeAgent, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = make_agent(Answering())
    monkeypatch.setattr(broken._loop, "_top_k", "secret")
    with serving(broken) as client:
        response = client.post(CHAT, json=body(questions[0].question))
        assert response.status_code == 500 and "secret" not in response.text
        assert response.json()["error"]["code"] == "bug"


@pytest.mark.parametrize("stream", [True, False])
def test_who_disconnects_ends_the_episode(
    make_agent: MakeAgent, questions: list[Question], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    retriever = Gate()
    agent = make_agent(retriever)
    stopped = threading.Event()

    def begin(request: AgentRequest, emit: Callable[[Event], None], cancelled: Callable[[], bool]) -> Asked:
        def looked() -> bool:
            if cancelled():
                stopped.set()
            return cancelled()

        return Agent.begin(agent, request, emit, looked)

    monkeypatch.setattr(agent, "begin", begin)
    with serving(agent, waiting=0) as client:
        other = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        asked = json.dumps(body(questions[0].question, stream=stream))
        other.request("POST", CHAT, asked, {"Content-Type": "application/json"})  # waits for no answer
        assert retriever.reached.wait(60), "it hangs in its first search"
        busy = client.post(CHAT, json=body("Who"))
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
        other.close()
        time.sleep(0.6)  # two looks at the connection
        retriever.opened.set()
        assert stopped.wait(60), "the episode goes on for nobody"
