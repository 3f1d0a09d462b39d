"""Requests are answered or refused with a status of their own fault; answers are read or a failure."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.endpoint import Endpoint, EndpointConfig
from dgpo_core.config.retrieval import EncoderConfig, parse_location
from dgpo_core.datasets.records import Passage
from dgpo_core.endpoint import EndpointClient
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval import client as retriever_client
from dgpo_core.retrieval.client import ServiceClient, describe_service
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.service import RetrieverService, make_app
from dgpo_core.serving.agent import Agent
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import tiny_model
from tests.dgpo_core.serving.conftest import FLOAT32
from tests.dgpo_core.serving.service import serving
from tests.fuzz.inputs import TEXTS, as_json, cases, changed, changed_bytes, damaged
from tests.web import served

SHORT = ProtocolConfig(
    instruction="short", max_turns=1, max_context=256, max_new_tokens=3, max_information=20
)
QUESTION = {
    "model": "tiny", "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "Who?"}],
    "stream": False, "temperature": 0.5, "seed": 1, "max_tokens": 2, "n": 1, "stop": None, "chat_id": "a",
}  # fmt: skip
QUERIES = {"queries": ["Ada", "Bel"], "topk": 2, "return_scores": True}
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def agent() -> Iterator[httpx.Client]:
    """A service of a model that writes nonsense."""
    tokenizer = build_tokenizer()
    engine = TransformersEngine(tiny_model(tokenizer), tokenizer, FLOAT32)
    with serving(Agent("tiny", engine, tokenizer, Answering(), SHORT, 3), history=True) as client:
        yield client


@pytest.fixture(scope="module")
def retriever() -> Iterator[str]:
    service = RetrieverService(top_k=2)
    passages = [Passage(str(i), name, f"{name} lies on the Aro.") for i, name in enumerate(("Ada", "Bel"))]
    service.open(index_passages(passages, EncoderConfig(kind="bm25")), 2)
    with served(make_app(service)) as url:
        yield url


@cases()
@given(body=changed(QUESTION).map(as_json) | damaged(as_json(QUESTION)))
def test_questions_over_http(agent: httpx.Client, body: bytes) -> None:
    response = agent.post("/v1/chat/completions", content=body, headers=JSON_TYPE)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["error"]["message"]
    elif response.headers["content-type"] == "application/json":
        assert response.json()["episode"]["ending"] in ("answered", "budget", "length")
    else:
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text


@cases()
@given(body=changed(QUERIES).map(as_json) | damaged(as_json(QUERIES)))
def test_queries_over_http(retriever: str, body: bytes) -> None:
    response = httpx.post(f"{retriever}/retrieve", content=body, headers=JSON_TYPE)
    if response.status_code == 200:
        assert len(response.json()["result"]) == len(json.loads(body)["queries"])
    else:
        assert response.status_code in (400, 413, 422), response.text
        assert response.json()["detail"]


HEAD = (
    b"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 17\r\n"
)
RAW = HEAD + b'Connection: close\r\n\r\n{"queries": ["a"]}'


@cases()
@given(sent=changed_bytes(RAW) | st.binary(max_size=60))
def test_what_is_hardly_http(agent: httpx.Client, sent: bytes) -> None:
    """It is answered as a fault, or not at all, and the next one is served."""
    with socket.create_connection((agent.base_url.host, agent.base_url.port or 0), timeout=20) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        received = b""
        while data := raw.recv(65536):
            received += data
    assert received == b"" or received.startswith((b"HTTP/1.1 2", b"HTTP/1.1 4")), received[:200]
    assert agent.get("/health").status_code == 200


ANSWER = {
    "result": [
        [{"document": {"id": "0", "contents": '"Ada"\nAda was born.'}, "score": 1.5},
         {"document": {"title": "Bel", "text": "x"}, "score": None}],
        [],
    ]
}  # fmt: skip
HEALTH = {"index": "d", "passages": 3}
CHOICES = {
    "choices": [{"message": {"content": "x"}, "text": "y", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    "data": [{"id": "m"}],
}  # fmt: skip
STATUSES = st.sampled_from([200] * 8 + [204, 301, 307, 400, 404, 413, 422, 429, 500, 503])
Say = Callable[[httpx.Request], httpx.Response]


def answers(valid: Any) -> SearchStrategy[tuple[int, bytes]]:
    return st.tuples(STATUSES, changed(valid).map(as_json) | damaged(as_json(valid)))


@pytest.fixture(scope="module")
def no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)
        yield


def saying(status: int, content: bytes) -> httpx.Client:
    """A client of somebody who says this to everything."""
    headers = {"Location": "http://127.0.0.1:9/", **JSON_TYPE}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content, headers=headers))
    return httpx.Client(transport=transport, base_url="http://foreign")


@pytest.mark.usefixtures("no_pauses")
@cases()
@given(said=answers(ANSWER))
def test_answers_of_retrievers(said: tuple[int, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_client, "_http", lambda: saying(200, b"{}"))
        client = ServiceClient("http://foreign", "unverified: http://foreign")
    client._client = saying(*said)
    try:
        found = client.hits(["a", "b"], 2)
    except (InfrastructureError, UserError) as error:
        assert "http://foreign/retrieve" in str(error)
        return
    assert len(found) == 2
    for hit in (hit for hits in found for hit in hits):
        hit.passage.contents.encode()  # can be written
        assert isinstance(hit.score, float)


@pytest.mark.usefixtures("no_pauses")
@cases()
@given(said=answers(HEALTH))
def test_what_retrievers_say_of_themselves(said: tuple[int, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_client, "_http", lambda: saying(*said))
        try:
            assert describe_service("http://foreign").digest
        except InfrastructureError as error:
            assert "http://foreign/health" in str(error)


@pytest.mark.usefixtures("no_pauses")
@cases()
@given(said=answers(CHOICES))
def test_answers_of_endpoints(said: tuple[int, bytes]) -> None:
    client = EndpointClient(Endpoint("m", "http://foreign"), EndpointConfig(attempts=2))
    client._http.close()
    client._http = saying(*said)
    asked: list[Callable[[], str]] = [
        lambda: client.chat([]).text,
        lambda: client.complete("x").text,
        lambda: " ".join(client.models()),
    ]
    for ask in asked:
        try:
            ask().encode()  # can be written
        except (InfrastructureError, UserError) as error:
            assert "http://foreign" in str(error)


@cases()
@given(location=TEXTS | TEXTS.map("http://".__add__) | TEXTS.map("retriever+https://h:".__add__))
def test_locations(location: str) -> None:
    """None but a known kind, and never one with a password."""
    try:
        found = parse_location(location)
    except ValueError as error:
        assert str(error).startswith("location: ")
        return
    assert found.kind in ("memory", "embedded", "folder") or "@" not in found.address
