"""The retriever as a service and its client, over HTTP: the field's contract, batches, failures."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client.parser import text_string_to_metric_families

from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval import client as client_module
from dgpo_core.retrieval import service
from dgpo_core.retrieval.client import ServiceClient, describe_service
from dgpo_core.retrieval.index import Index, index_passages, open_index
from dgpo_core.retrieval.ranking import Hit
from dgpo_core.retrieval.service import (
    MAX_QUERIES,
    MAX_QUERY,
    MAX_TOP_K,
    Batcher,
    RetrieverService,
    make_app,
    refusal,
)
from dgpo_core.retrieval.shards import read_manifest
from dgpo_core.serving.access import restrict
from tests.dgpo_core.retrieval.conftest import BM25
from tests.web import served


@pytest.fixture
def retrieval(shards: Path) -> Iterator[RetrieverService]:
    made = RetrieverService(top_k=3)
    made.open(open_index(shards, RetrievalConfig(encoder=BM25)), 150)
    yield made
    made.close()


@pytest.fixture
def url(retrieval: RetrieverService) -> Iterator[str]:
    with served(make_app(retrieval)) as address:
        yield address


def search_r1(url: str, queries: list[str], topk: int) -> list[list[str]]:
    """What Search-R1's generation does with its server's answer: numbered titles and texts."""
    payload = {"queries": queries, "topk": topk, "return_scores": True}
    results = httpx.post(f"{url}/retrieve", json=payload, timeout=60).json()["result"]
    return [
        [
            f"(Title: {item['document']['contents'].split(chr(10))[0]}) "
            f"{chr(10).join(item['document']['contents'].split(chr(10))[1:])}"
            for item in result
        ]
        for result in results
    ]


def test_the_fields_contract(url: str, retrieval: RetrieverService, queries: list[tuple[str, str]]) -> None:
    asked = [queries[0][0], queries[5][0]]
    assert retrieval.index
    expected = retrieval.index.search(asked, 2)
    shown = search_r1(url, asked, 2)
    assert shown == [[f'(Title: "{h.passage.title}") {h.passage.text}' for h in hits] for hits in expected]
    body = {"queries": asked, "topk": 2, "return_scores": True}
    answer = httpx.post(f"{url}/retrieve", json=body).json()
    assert answer["result"] == [
        [{"document": {"id": h.passage.id, "contents": h.passage.contents}, "score": h.score} for h in hits]
        for hits in expected
    ]
    without = httpx.post(f"{url}/retrieve", json={**body, "return_scores": False, "unknown": 1}).json()
    assert without["result"] == [[item["document"] for item in result] for result in answer["result"]]
    defaults = httpx.post(f"{url}/retrieve", json={"queries": asked}).json()
    assert [len(result) for result in defaults["result"]] == [3, 3]
    nulls = {"queries": asked, "topk": None}
    assert httpx.post(f"{url}/retrieve", json=nulls).json() == defaults
    assert httpx.post(f"{url}/retrieve", json={"queries": []}).json() == {"result": []}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"queries": "one"}, "queries: Input should be a valid list"),
        ({}, "queries: Field required"),
        ({"queries": ["a", 3]}, "queries.1: Input should be a valid string"),
        ({"queries": ["a"], "topk": MAX_TOP_K + 1}, "topk: Input should be less than or equal to"),
        ({"queries": ["a"], "topk": -1}, "topk: Input should be greater than or equal to 0"),
        ([], "body: Input should be a valid dictionary"),
        ({"queries": ["a", "town \ud800"]}, "queries.1: not valid Unicode: half a surrogate pair"),
        (
            {"queries": ["x" * (MAX_QUERY + 1)]},
            "queries.0: 100,001 characters; at most 100,000 are searched for",
        ),
        ({"queries": ["a"] * (MAX_QUERIES + 1)}, "queries: List should have at most 10000 items"),
        ({"queries": ["a"], "topk": 10**30}, "topk: Input should be less than or equal to"),
        ({"queries": ["a"], "topk": 2.5}, "topk: Input should be a valid integer"),
        ({"queries": [None]}, "queries.0: Input should be a valid string"),
        ({"queries": {"a": 1}}, "queries: Input should be a valid list"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(url: str, body: Any, reason: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/retrieve", content=json.dumps(body), headers=headers, timeout=60)
    assert response.status_code == 422
    assert response.json()["detail"].startswith(reason)
    assert "retry-after" not in response.headers


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[" * 100_000, b'{"queries": [1e999]}', b"null", b""])
def test_what_is_no_request_is_said_too(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/retrieve", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["detail"]


def test_a_request_that_is_too_large_is_not_read(
    retrieval: RetrieverService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_BODY", 1000)
    with served(make_app(retrieval)) as url:
        response = httpx.post(f"{url}/retrieve", json={"queries": ["x" * 2000]})
        assert (response.status_code, "at most 1,000" in response.json()["detail"]) == (413, True)
        assert httpx.post(f"{url}/retrieve", json={"queries": ["", " ", "film"]}).status_code == 200
        assert 'requests_total{status="413"}' in httpx.get(f"{url}/metrics").text
        monkeypatch.setattr(service, "MAX_WAITING", -1)
        full = httpx.post(f"{url}/retrieve", json={"queries": ["film"]})
        assert (full.status_code, full.headers["retry-after"]) == (429, "5")


def test_the_key_is_asked_for_and_sent_and_goes_nowhere_else(
    retrieval: RetrieverService, queries: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that sends us elsewhere is no retriever; nobody follows it, inside the network neither."""
    app = make_app(retrieval)
    restrict(app, "127.0.0.1", key="k", refusal=refusal)
    asked: list[str] = []
    elsewhere = FastAPI()

    @elsewhere.middleware("http")
    async def note(request: Request, _call: Any) -> Response:
        asked.append(request.url.path)
        return JSONResponse({"result": [[]]})

    with served(app) as url, served(elsewhere) as inside:
        assert retrieval.index is not None
        foreign = httpx.post(f"{url}/retrieve", json={"queries": ["x"]}, headers={"Host": "evil.example"})
        assert (foreign.status_code, "not to 'evil.example'" in foreign.json()["detail"]) == (400, True)
        with pytest.raises(UserError, match="asks for its API key"):
            ServiceClient(url, retrieval.index.digest).hits([queries[0][0]], 3)
        monkeypatch.setenv("DGPO_RETRIEVER_KEY", "k")
        assert ServiceClient(url, retrieval.index.digest).hits([queries[0][0]], 3)[0]
        sending = FastAPI()

        @sending.middleware("http")
        async def send(request: Request, _call: Any) -> Response:
            return RedirectResponse(f"{inside}{request.url.path}", 307)

        with served(sending) as redirecting:
            client = ServiceClient(redirecting, f"unverified: {redirecting}")
            with pytest.raises(InfrastructureError, match="HTTP 307"):
                client.hits(["x"], 3)
    assert asked == []


def test_our_client_gets_what_the_index_gives(
    url: str, retrieval: RetrieverService, queries: list[tuple[str, str]], shards: Path
) -> None:
    opened = open_index(shards, RetrievalConfig(encoder=BM25, location=f"retriever+{url}"))
    assert retrieval.index
    assert opened.digest == retrieval.index.digest
    asked = [query for query, _ in queries[:300]] + ["zzzzqqq"]
    found = opened.search(asked, 3)
    assert found == retrieval.index.search(asked, 3)
    assert found[-1] == [], "nothing was found: not a failure"
    assert opened.searcher is None
    with pytest.raises(UserError, match=r"/retrieve refuses the request: topk: Input should be less"):
        opened.search(["a"], MAX_TOP_K + 1)


def test_another_index_is_not_taken_for_ours(url: str, retrieval: RetrieverService) -> None:
    with pytest.raises(InfrastructureError, match=r"serves the index .* not 'other', which data/index names"):
        ServiceClient(url, "other")
    assert retrieval.index
    client = ServiceClient(url, retrieval.index.digest)
    retrieval.index.digest = "changed meanwhile"
    with pytest.raises(InfrastructureError, match="serves the index 'changed meanwhile'"):
        client.hits(["film"], 1)


def foreign(answer: Any, status: int = 200) -> FastAPI:
    """A server as Search-R1's: /retrieve alone."""
    app = FastAPI()
    app.state.asked = 0

    @app.post("/retrieve")
    def retrieve() -> Response:
        app.state.asked += 1
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return Response(text, status, media_type="application/json")

    return app


@contextmanager
def client_of(app: FastAPI) -> Iterator[ServiceClient]:
    with served(app) as url:
        about = describe_service(url)
        assert about == (f"unverified: {url}", 0), "a server of others is known by its address"
        yield ServiceClient(url, about.digest)


@pytest.mark.parametrize(
    "health",
    ['{"index": null, "passages": 3}', '{"index": "", "passages": 3}', '{"index": "a"}', "[]", "[" * 9999],
)
def test_an_index_without_a_name_is_known_by_its_address(health: str) -> None:
    app = foreign({})

    @app.get("/health")
    def said() -> Response:
        return Response(health, media_type="application/json")

    with served(app) as url:
        assert describe_service(url) == (f"unverified: {url}", 0)


ITEM = {"document": {"id": "1", "contents": '"T"\ntext'}, "score": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        {"result": []},  # fewer results than queries
        {"result": [[], []]},
        {"result": [[{**ITEM, "score": "much"}]]},
        {"result": [[{**ITEM, "score": True}]]},
        {"result": [[{**ITEM, "document": {"id": "1"}}]]},  # no text
        {"result": [[{**ITEM, "document": {"contents": " "}}]]},
        {"result": [[{**ITEM, "document": None}]]},
        {"result": [[ITEM, None]]},
        {"result": [None]},
        {"result": {"a": []}},
        {"result": None},
        {"results": [[ITEM]]},
        [],
        "gone",
    ],
)
def test_a_broken_answer_is_a_failure_and_never_an_empty_result(answer: Any) -> None:
    with (
        client_of(foreign(answer)) as client,
        pytest.raises(InfrastructureError, match=r"does not answer as a retriever does"),
    ):
        client.hits(["a"], 3)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([ITEM] * 5, [("1", "T", "text", 1.0)] * 3),  # more than were asked for
        (
            [{"document": {"id": "12", "contents": '"A title"\nand\ntext', "url": "ignored"}, "score": 0.75}],
            [("12", "A title", "and\ntext", 0.75)],
        ),
        ([ITEM["document"]], [("1", "T", "text", 1.0)]),  # the document alone, without its score
        ([ITEM, {**ITEM, "score": None}], [("1", "T", "text", 1.0), ("1", "T", "text", 0.5)]),
        ([{**ITEM, "score": float("nan")}], [("1", "T", "text", 1.0)]),
        ([{**ITEM, "score": 10**400}], [("1", "T", "text", 1.0)]),
        ([{**ITEM, "score": 7}], [("1", "T", "text", 7.0)]),
        (
            [{"document": {"id": 5, "title": "T", "text": "text", "contents": None}}],
            [("5", "T", "text", 1.0)],
        ),
        ([{"document": {"id": "5", "contents": '"T" \r\ntext'}}], [("5", "T", "text", 1.0)]),  # of Windows
        ([{"document": {"id": "5", "contents": "one line"}}], [("5", "", "one line", 1.0)]),
        ([{"document": {"id": "5", "contents": "T\nhalf \ud800"}}], [("5", "T", "half ?", 1.0)]),
    ],
)
def test_the_answers_of_the_field_are_read(items: list[Any], expected: list[tuple[Any, ...]]) -> None:
    with client_of(foreign(json.dumps({"result": [items]}))) as client:
        (hits,) = client.hits(["a"], 3)
    assert [(h.passage.id, h.passage.title, h.passage.text, h.score) for h in hits] == expected


def test_a_passage_without_an_id_is_known_by_its_contents() -> None:
    names = []
    for texts in (("one", "two"), ("two", "three")):
        items = [{"document": {"contents": f'"T"\n{text}', "id": None}} for text in texts]
        with client_of(foreign({"result": [items]})) as client:
            (hits,) = client.hits(["a"], 3)
        names.append([hit.passage.id for hit in hits])
    assert names[0][1] == names[1][0]
    assert len({*names[0], *names[1]}) == 3


def test_the_first_question_shows_whether_it_is_a_retriever(quick: None) -> None:
    textless = {"result": [[{"document": {"id": "1"}}], []]}
    cases: list[tuple[Any, int, str]] = [
        (textless, 200, r"a document without .*contents.*; its keys are 'id'"),
        ({"result": [[], []]}, 200, r"finds nothing for any of 2 questions, as for 'q'"),
        ({"detail": "Not Found"}, 404, r"refuses the request: Not Found"),
        ("<html>", 200, r"does not answer as a retriever does"),
    ]
    for answer, status, message in cases:
        with client_of(foreign(answer, status)) as client, pytest.raises(UserError, match=message):
            client.require(["q", "r"], 3)


def test_of_many_queries_the_refused_one_is_named_and_no_request_is_large() -> None:
    app = FastAPI()
    sizes: list[int] = []

    @app.post("/retrieve")
    async def retrieve(request: Request) -> JSONResponse:
        body = await request.body()
        sizes.append(len(body))
        queries = json.loads(body)["queries"]
        if "bad" in queries:
            return JSONResponse({"detail": "I do not like it"}, 400)
        return JSONResponse({"result": [[] for _ in queries]})

    with client_of(app) as client:
        assert client.hits(["\0" * 50_000] * 7, 3) == [[]] * 7
        assert len(sizes) == 7
        assert max(sizes) < client_module.BATCH_BYTES
        with pytest.raises(UserError, match=r"I do not like it \(query: 'bad'\)"):
            client.hits(["good", "bad"], 3)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LONGEST_WAIT", 0.01)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_overload_is_waited_for_and_then_a_failure(quick: None, status: int) -> None:
    app = foreign({"detail": "too much to do"}, status)
    with (
        client_of(app) as client,
        pytest.raises(InfrastructureError, match=f"HTTP {status}: too much to do"),
    ):
        client.hits(["a"], 3)
    assert app.state.asked == client_module.ATTEMPTS


def test_nobody_is_there(quick: None) -> None:
    with pytest.raises(InfrastructureError, match=r"no answer from http://127\.0\.0\.1:9/health"):
        ServiceClient("http://127.0.0.1:9", "d")


def test_it_is_not_ready_while_it_loads(quick: None) -> None:
    loading = RetrieverService(top_k=3)
    with served(make_app(loading)) as url:
        assert httpx.get(f"{url}/health").status_code == 503
        response = httpx.post(f"{url}/retrieve", json={"queries": ["a"]})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        with pytest.raises(InfrastructureError, match="HTTP 503"):
            ServiceClient(url, "d")


def test_a_failing_index_is_a_503(url: str, retrieval: RetrieverService) -> None:
    assert retrieval.index
    retrieval.index.close()
    response = httpx.post(f"{url}/retrieve", json={"queries": ["a query that nobody asked"]})
    assert response.status_code == 503
    assert response.json()["detail"].startswith("the index failed: ")


def test_concurrent_requests_share_searches(dense_shards: Path, queries: list[tuple[str, str]]) -> None:
    """Each gets its own answer, and one pass encodes the queries of many."""
    config = RetrievalConfig(encoder=read_manifest(dense_shards).encoder_config)
    retrieval = RetrieverService(top_k=3)
    retrieval.open(open_index(dense_shards, config), 150)
    asked = [query for query, _ in queries[:192]]
    index = open_index(dense_shards, config)
    expected = [[hit.passage.id for hit in hits] for hits in index.search(asked, 2)]
    one_by_one, at_once = asked[:96], asked[96:]

    all_kept = httpx.Limits(max_keepalive_connections=None)  # else one closes what another was just given
    with served(make_app(retrieval)) as url, httpx.Client(timeout=60, limits=all_kept) as http:

        def ask(query: str) -> list[str]:
            body = {"queries": [query], "topk": 2, "return_scores": True}
            (result,) = http.post(f"{url}/retrieve", json=body).json()["result"]
            return [item["document"]["id"] for item in result]

        def searches() -> tuple[float, float]:
            families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
            values = {s.name: s.value for family in families for s in family.samples if not s.labels}
            assert values["dgpo_retriever_waiting_queries"] == 0
            name = "dgpo_retriever_batch_queries"
            return values[f"{name}_count"], values[f"{name}_sum"]

        found = [ask(query) for query in one_by_one]
        assert searches() == (96, 96)
        with ThreadPoolExecutor(32) as pool:
            found += pool.map(ask, at_once)
        number, total = searches()
    assert found == expected
    assert total == 192
    assert number - 96 < 96 / 3, "several queries in a search"
    index.close()
    retrieval.close()


def searched(
    index: Index, requests: list[tuple[list[str], int]], largest: int
) -> tuple[list[Any], list[int]]:
    """The answers of requests that come at once (exceptions as they are), and the searches' sizes."""
    sizes: list[int] = []

    async def run() -> list[Any]:
        batcher = Batcher(index, largest, lambda queries, seconds: sizes.append(queries))
        answers = await asyncio.gather(*(batcher.search(*r) for r in requests), return_exceptions=True)
        assert batcher.waiting == 0
        batcher.close()
        return list(answers)

    return asyncio.run(run()), sizes


def test_batches_hold_what_fits_and_wants_as_many_passages(
    index: Index, queries: list[tuple[str, str]]
) -> None:
    asked = [query for query, _ in queries[:12]]
    requests = [(asked[0:1], 3), (asked[1:3], 3), (asked[3:4], 2), (asked[4:11], 3), (asked[11:], 3), ([], 3)]
    answers, sizes = searched(index, requests, largest=4)
    assert answers == [index.search(some, top_k) for some, top_k in requests]
    assert sizes == [1 + 2 + 1, 1, 7], "the oldest first; seven are more than fit, and go alone"


def test_a_failure_is_everybodys_and_the_next_search_is_another(passages: list[Passage]) -> None:
    broken = index_passages(passages[:20], BM25)
    broken.close()
    answers, sizes = searched(broken, [(["a"], 3), (["b"], 3)], largest=4)
    assert [type(answer) for answer in answers] == [InfrastructureError] * 2
    assert sizes == []


def test_one_clients_fault_is_its_own(index: Index, queries: list[tuple[str, str]]) -> None:
    good = [queries[0][0]]
    answers, _ = searched(index, [(good, 3), (["town \ud800"], 3), (["film"], 3), (good, 3)], largest=9)
    assert isinstance(answers[1], UserError)
    assert "not valid Unicode" in str(answers[1])
    assert [answers[0], answers[2], answers[3]] == [index.search(q, 3) for q in (good, ["film"], good)]


def test_a_client_that_leaves_disturbs_nobody(index: Index, queries: list[tuple[str, str]]) -> None:
    async def run() -> list[list[Hit]]:
        batcher = Batcher(index, 8, lambda queries, seconds: None)
        leaving = asyncio.create_task(batcher.search([queries[0][0]], 3))
        staying = asyncio.create_task(batcher.search([queries[1][0]], 3))
        await asyncio.sleep(0)
        leaving.cancel()
        found = await staying
        with pytest.raises(asyncio.CancelledError):
            await leaving
        batcher.close()
        return found

    assert asyncio.run(run()) == index.search([queries[1][0]], 3)
