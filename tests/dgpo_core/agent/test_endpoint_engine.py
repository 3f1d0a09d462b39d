"""A teacher behind an endpoint, over real HTTP: its episodes, failures, the same model in this process."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.endpoint_engine import EndpointEngine
from dgpo_core.agent.engine import Request, generate
from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import STOP, AgentLoop, Task
from dgpo_core.agent.prompts import message_text
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import GREEDY, ProtocolConfig, RolloutConfig, Sampling
from dgpo_core.config.endpoint import EndpointConfig, endpoint_of
from dgpo_core.datasets.records import Question
from dgpo_core.endpoint import EndpointClient
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.models import load_model, load_tokenizer
from tests.conftest import ROOT
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import question
from tests.endpoint import Body, Say, endpoint

PROTOCOL = ProtocolConfig(instruction="short", max_turns=2, max_context=600, max_new_tokens=64)
SEARCH = "<think> I need it. </think>\n<search> Ada </search>"
ANSWER = "<think> Ada was born in Paris. </think>\n<answer> Paris </answer> and more"


def episodes(
    source: str, asked: list[Question], tokenizer: Any, retriever: Any, api: str = "chat", **config: Any
) -> list[Episode]:
    address = endpoint_of(source)
    assert address is not None
    settings = EndpointConfig.model_validate({"attempts": 2, "concurrency": 2} | config)
    with EndpointClient(address, settings) as client:
        engine = EndpointEngine(client, api, asked, "short", tokenizer)
        tasks = [Task(each, "mine", seed=(number, 7)) for number, each in enumerate(asked)]
        return AgentLoop(engine, tokenizer, retriever, PROTOCOL, 3).run(tasks, GREEDY)


def searching(body: Body) -> str:
    """Search first, then answer."""
    return ANSWER if "<information>" in str(body["messages"]) else SEARCH


@pytest.mark.parametrize("stops", [True, False])
def test_an_episode_goes_as_messages_and_comes_back_as_tokens(
    stops: bool, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server stops where it is asked to, or writes on."""
    monkeypatch.setenv("SOME_KEY", "secret")
    with endpoint(searching, stops) as server:
        (run,) = episodes(server.source, [question()], tokenizer, Answering(), key_variable="SOME_KEY")
    assert run.correct and run.well_formed and run.prediction == "Paris" and "more" not in run.response
    assert tokenizer.decode(
        [i for i, owner in zip(run.token_ids, run.owners, strict=True) if owner == 1]
    ) == (SEARCH + ANSWER.removesuffix(" and more"))
    first, second = server.requests
    asked = {"role": "user", "content": message_text("Where was Ada born", "short")}
    assert first["messages"] == [asked] and first["stop"] == list(STOP) and first["model"] == "some/model"
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][0] == asked and second["messages"][1]["content"] == SEARCH
    assert second["messages"][2]["content"].startswith("<information>Doc 1(Title: Ada) Ada was born")
    assert server.keys == ["Bearer secret"] * 2


def test_the_same_model_here_and_behind_an_endpoint_writes_the_same(world_index: Any) -> None:
    """The committed teacher, greedy, behind completions: the text of an episode is all that travels."""
    tokenizer = load_tokenizer(str(ROOT / "models/teacher"))
    here = TransformersEngine(
        load_model(str(ROOT / "models/teacher")), tokenizer, RolloutConfig(precision="float32")
    )
    index, asked = world_index

    def say(body: Body) -> str:
        ids = tokenizer.encode(body["prompt"], add_special_tokens=False)
        (written,) = generate(here, [Request(ids, body["max_tokens"], (0,))], GREEDY, tuple(body["stop"]))
        text: str = tokenizer.decode(written.token_ids)
        return text

    with endpoint(say) as server:
        there = episodes(server.source, asked, tokenizer, index, "completions", concurrency=1)
    tasks = [Task(each, "mine") for each in asked]
    own = AgentLoop(here, tokenizer, index, PROTOCOL, 3).run(tasks, GREEDY)
    assert [run.token_ids for run in there] == [run.token_ids for run in own]
    assert any(run.correct for run in own)


@pytest.fixture
def world_index(index: Any, world: Any, articles: Any) -> tuple[Any, list[Question]]:
    from dgpo_core.world.questions import write_questions

    return index, write_questions(world, articles)["onehop", "train"][:4]


def test_a_request_that_fails_is_no_wrong_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of two questions one is never answered; the other's first attempt fails, and its second is right."""
    tried: list[str] = []

    def say(body: Body) -> str | int:
        asked = str(body["messages"])
        tried.append(asked)
        if "Bob" in asked:
            return 503
        return 429 if len([each for each in tried if "Bob" not in each]) == 1 else searching(body)

    with endpoint(say) as server:
        asked = [question(), question("Where was Bob born", name="q1")]
        right, failed = episodes(server.source, asked, tokenizer, Answering())
    assert right.correct
    assert failed.outcome is Outcome.FAILED and "503" in str(failed.failure)
    assert sum("Bob" in each for each in tried) == 2


def test_a_request_that_the_server_does_not_take_fails_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    with endpoint(lambda body: 400) as server:
        (run,) = episodes(server.source, [question()], tokenizer, Answering())
    assert run.outcome is Outcome.FAILED and len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_what_no_request_would_get_stops_the_stage(status: int, tokenizer: PreTrainedTokenizerFast) -> None:
    with endpoint(lambda body: status) as server, pytest.raises(UserError, match="key in \\$OPENAI_API_KEY"):
        episodes(server.source, [question()], tokenizer, Answering())


def test_nobody_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    (run,) = episodes("openai:m@http://127.0.0.1:9/v1", [question()], tokenizer, Answering())
    assert run.outcome is Outcome.FAILED and "does not answer" in str(run.failure)


def test_sampling_has_a_seed_of_its_own(tokenizer: PreTrainedTokenizerFast) -> None:
    with endpoint(lambda body: ANSWER) as server:
        address = endpoint_of(server.source)
        assert address is not None
        with EndpointClient(address, EndpointConfig()) as client:
            engine = EndpointEngine(client, "completions", [question()], "short", tokenizer)
            for temperature, turn in ((0.0, 0), (1.0, 0), (1.0, 0), (1.0, 1)):
                request = Request(tokenizer.encode("Where"), 10, (0, 3, turn))
                generate(engine, [request], Sampling(temperature=temperature), STOP)
    seeds = [body.get("seed") for body in server.requests]
    assert seeds[0] is None and seeds[1] == seeds[2] != seeds[3]
    assert all(0 <= seed < 2**31 for seed in seeds[1:] if seed is not None)


def test_answers_that_are_none(tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer longer than the turn may be is cut; half a character is one that is not known."""
    say: Say = lambda body: "<think> Ada " * 60  # noqa: E731
    with endpoint(say) as server:
        (run,) = episodes(server.source, [question()], tokenizer, Answering())
    assert run.outcome is Outcome.WRONG and run.cut_turns == 3
    with endpoint(lambda body: "\ud83d") as server:
        (run,) = episodes(server.source, [question()], tokenizer, Answering())
    assert run.outcome is Outcome.WRONG and run.invalid_actions == 3


def test_addresses() -> None:
    known = endpoint_of("openai:org/model:7b@https://host.example/api/v1/")
    assert known is not None and (known.model, known.url) == ("org/model:7b", "https://host.example/api/v1")
    assert endpoint_of("models/teacher") is None and endpoint_of("owner/name") is None
    with_a_key = "openai:m@https://user:{}@host/v1".format("key")
    for wrong in ("https://host/v1", "openai:model", with_a_key, "openai:@http://h"):
        with pytest.raises(ValueError, match="is no endpoint"):
            endpoint_of(wrong)


def test_a_content_filter_is_a_failure() -> None:
    class Odd(EndpointClient):
        def _sent(self, method: str, path: str, body: Any, kind: Any) -> Any:
            choice = {"message": {"content": "x"}, "finish_reason": "content_filter"}
            return kind.model_validate({"choices": [choice]})

    address = endpoint_of("openai:m@http://127.0.0.1:9/v1")
    assert address is not None
    with Odd(address, EndpointConfig()) as client, pytest.raises(InfrastructureError, match="content_filter"):
        client.chat([])
