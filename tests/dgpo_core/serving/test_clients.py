"""Clients that people use: OpenAI's own, and the requests of chat programs as their sources send them.

The requests were written by hand from what these programs' public sources put together; values are ours.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dgpo_core.datasets.records import Question
from dgpo_core.serving.agent import Agent
from dgpo_core.serving.events import AgentRequest
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.serving.conftest import MakeAgent
from tests.dgpo_core.serving.service import serving

CHAT = "/v1/chat/completions"
ASKED = "{question}"  # takes the place of the question
CHATS: dict[str, dict[str, Any]] = {
    # backend/open_webui/routers/openai.py and utils/payload.py: the model's system prompt, its parameters
    # where they are set, and usage where the model has that capability
    "Open WebUI": {
        "stream": True,
        "model": "teacher",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. Today is Saturday."},
            {"role": "user", "content": "Who was Ada?"},
            {"role": "assistant", "content": "A director."},
            {"role": "user", "content": ASKED},
        ],
        "temperature": 0.0,
        "max_tokens": 4096,
        "frequency_penalty": 0.0,
        "stop": [],
        "stream_options": {"include_usage": True},
    },
    # packages/api/src/endpoints/openai/llm.ts over LangChain's ChatOpenAI: parts, a user's id, one choice
    "LibreChat": {
        "model": "teacher",
        "temperature": 0,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 1,
        "user": "66f0c0ffee",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Answer in one line."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Hello, how can I help?"}]},
            {"role": "user", "content": [{"type": "text", "text": ASKED}]},
        ],
    },
    # web-app/src/lib/completion.ts: the assistant's instructions; no tool is a missing or an empty list
    "Jan": {
        "model": "teacher",
        "messages": [
            {"role": "system", "content": "You are a helpful AI assistant."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting.", "tool_calls": []},
            {"role": "user", "content": ASKED},
        ],
        "tools": [],
        "tool_choice": None,
        "stream": True,
        "stop": None,
        "timings_per_token": True,
    },
}


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[httpx.Client]:
    with serving(agent) as made:
        yield made


@pytest.mark.parametrize("program", CHATS)
def test_chat_programs_get_the_answer_to_the_last_question(
    program: str, client: httpx.Client, agent: Agent, questions: list[Question]
) -> None:
    asked = questions[1].question
    sent = json.dumps(CHATS[program]).replace(ASKED, asked)
    with client.stream("POST", CHAT, content=sent, headers={"Content-Type": "application/json"}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    record = agent.ask(AgentRequest(asked), lambda event: None, lambda: False)
    assert "".join(delta.get("content") or "" for delta in deltas) == record.answer
    thought = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert all(step.text in thought for step in record.steps if step.kind in ("think", "search"))
    assert ("usage" in chunks[-1]) == ("stream_options" in CHATS[program])


def test_openais_own_client(client: httpx.Client, agent: Agent, questions: list[Question]) -> None:
    openai = pytest.importorskip("openai", reason="the extra `dev` is not installed")
    asked = questions[1].question
    record = agent.ask(AgentRequest(asked), lambda event: None, lambda: False)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": asked}]
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="any", max_retries=0) as official:
        (model,) = official.models.list().data
        assert official.models.retrieve(model.id) == model
        done = official.chat.completions.create(model=model.id, messages=messages)
        message = done.choices[0].message
        assert (message.content, done.choices[0].finish_reason) == (record.answer, "stop")
        assert done.usage.total_tokens == record.model_tokens + record.other_tokens
        parts = [
            chunk.choices[0].delta
            for chunk in official.chat.completions.create(model=model.id, messages=messages, stream=True)
        ]
        assert "".join(part.content or "" for part in parts) == record.answer
        thought = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
        assert thought == message.reasoning_content
        with pytest.raises(openai.BadRequestError, match="only 1, not 2"):
            official.chat.completions.create(model=model.id, messages=messages, n=2)
        with pytest.raises(openai.NotFoundError):
            official.models.retrieve("gpt")


def test_a_key_is_asked_for_where_there_is_one(agent: Agent) -> None:
    page = "http://localhost:3000"
    with serving(agent, key="secret", origins=(page,)) as client:
        assert [client.get(path).status_code for path in ("/", "/health", "/metrics")] == [200, 200, 200]
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            refused = client.get("/v1/models", headers={**given, "Origin": page})
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["access-control-allow-origin"] == page, "its script can read why"
        assert client.get("/examples").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        asks = {"Origin": page, "Access-Control-Request-Method": "POST"}
        assert client.options(CHAT, headers=asks).status_code == 200


def test_the_conversation_comes_before_the_question_where_that_is_wanted(
    make_agent: MakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(Answering())
    read: list[str] = []

    def question(key: str, text: str, golden: tuple[str, ...]) -> Question:
        read.append(text)
        return Question(key, text, golden)

    monkeypatch.setattr("dgpo_core.serving.agent.Question", question)
    long = "Ula " * 3000
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": long},
        {"role": "user", "content": "Who directed\nBel?"},
        {"role": "assistant", "content": "Ada"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
        {"role": "user", "content": "Where was she born?"},
    ]
    for history in (True, False):
        with serving(agent, history=history) as client:
            done = client.post(CHAT, json={"model": "teacher", "messages": messages})
        assert done.json()["episode"]["question"] == "Where was she born?"
        assert done.headers["x-ignored-parameters"] == "messages", "the system's"
    conversation = "user: Who directed Bel?\nassistant: Ada\nWhere was she born?"
    assert read == [conversation, "Where was she born?"], "what is too long is left out, the oldest first"


@pytest.mark.usefixtures("no_pauses")
def test_metrics_count_episodes_by_their_end(make_agent: MakeAgent, questions: list[Question]) -> None:
    body = {"model": "teacher", "messages": [{"role": "user", "content": questions[0].question}]}
    with serving(make_agent(Answering())) as client:
        usage = [client.post(CHAT, json=body).json()["usage"] for _ in range(2)]
        client.post(CHAT, json=body | {"max_tokens": 1})
        client.post(CHAT, json=body | {"messages": [{"role": "user", "content": " "}]})
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
        }
    ended = {key[1]: value for key, value in samples.items() if key[0] == "dgpo_agent_episodes_total"}
    assert sum(ended.values()) == 4 and ended["UserError"] == 1 and ended["answered"] == 2
    assert samples[("dgpo_agent_episode_seconds_count",)] == 3
    assert samples[("dgpo_agent_tokens_total",)] > sum(one["completion_tokens"] for one in usage)
    assert samples[("dgpo_agent_ready",)] == 1 and samples[("dgpo_agent_running",)] == 0
