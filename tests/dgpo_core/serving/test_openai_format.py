"""What a chat request asks of the agent: any client's neutral parameters, any conversation, any JSON."""

import json
from typing import Any

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from dgpo_core.serving.app import _ignored
from dgpo_core.serving.events import AgentRequest
from dgpo_core.serving.openai_format import ChatRequest

NEUTRAL: dict[str, list[Any]] = {
    "n": [1],
    "stop": [[], ""],
    "top_p": [1, 1.0],
    "presence_penalty": [0, 0.0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "logprobs": [False],
    "top_logprobs": [0],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "audio": [],
    "web_search_options": [],
    "stream": [False, True],
    "stream_options": [{}, {"include_usage": True, "include_obfuscation": True}],
    "temperature": [0],
    "seed": [0],
    "max_tokens": [],
    "max_completion_tokens": [],
    "metadata": [{}, {"a": "b"}],
    "prediction": [{"type": "content", "content": "x"}],
    "parallel_tool_calls": [True, False],
    "prompt_cache_key": ["x"],
    "prompt_cache_retention": ["24h"],
    "reasoning_effort": ["low"],
    "safety_identifier": ["x"],
    "service_tier": ["auto"],
    "store": [True, False],
    "user": ["me"],
    "verbosity": ["medium"],
    "chat_id": ["x"],
    "session_id": ["x"],
}  # every parameter of OpenAI's, with the values that leave an answer as it is
VALUES = {name: st.sampled_from([None, *values]) for name, values in NEUTRAL.items()}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
QUESTION = {"role": "user", "content": "Who"}


def request(**more: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "kd", "messages": [QUESTION], **more})


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_neutral_parameters_ask_the_same(sent: dict[str, Any]) -> None:
    assert request(**sent).agent_request() == AgentRequest("Who")


@pytest.mark.parametrize(
    "name", [name for name, values in NEUTRAL.items() if name.startswith(("n", "to", "fu", "re"))]
)
@given(value=JSON)
def test_any_other_value_is_refused_or_ignored(name: str, value: Any) -> None:
    try:
        made = request(**{name: value})
    except ValidationError as error:
        (fault,) = error.errors()
        assert fault["loc"] == (name,)
        fault["msg"].encode()  # can be sent, whatever the value has of half characters
        return
    neutral = value is None or value in NEUTRAL[name]
    assert neutral or made.ignored() == [name]


@given(st.lists(st.sampled_from(["system", "developer", "assistant", "tool", "user"]), max_size=6), JSON)
def test_the_last_message_of_the_user_is_the_question(roles: list[str], content: Any) -> None:
    """What the others hold is of no account."""
    before = [{"role": role, "content": content} for role in roles]
    for after in ([], [{"role": "assistant", "content": content, "tool_calls": [{"id": "1"}]}]):
        made = request(messages=[*before, QUESTION, *after])
        assert made.agent_request() == AgentRequest("Who")
        assert made.ignored() == (["messages"] if before or after else [])


@given(JSON)
def test_a_question_is_text_or_refused(content: Any) -> None:
    try:
        question = request(messages=[{"role": "user", "content": content}]).agent_request().question
    except ValidationError as error:
        assert error.errors()[0]["loc"] == ("messages",)
        error.errors()[0]["msg"].encode()
    else:
        assert question == content or content == []


@given(st.lists(st.text(st.characters()), max_size=40))
@example([""])
@example(["messages", ""])
@example([" x\t"])
def test_ignored_names_fit_into_a_header(names: list[str]) -> None:
    """The server's own library takes it: else a client would get no answer."""
    for name, value in _ignored(names).items():
        h11.Response(status_code=200, headers=[(name.encode(), value.encode("ascii"))])
        assert len(value) <= 1000


@given(st.integers())
def test_any_seed_is_one_that_samples(seed: int) -> None:
    asked = request(seed=seed).agent_request().seed
    assert asked >= 0 and (asked == seed or not 0 <= seed < 2**64)
    json.dumps(asked)
