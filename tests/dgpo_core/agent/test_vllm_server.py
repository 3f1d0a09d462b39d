"""The HTTP client against a server that answers as told (a real vLLM is in test_vllm_engines.py)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.engine import FinishReason, Generation, Request, generate, weights_of
from dgpo_core.agent.vllm_server import GENERATE, VllmServerEngine
from dgpo_core.config.agent import RolloutConfig, Sampling, ServerConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.models import load_model, load_tokenizer, save_model
from tests.web import Handler, handled

STUDENT = str(Path(__file__).resolve().parents[3] / "models" / "student")
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class Pretender:
    """Answers each path; `answers` replaces some of them, `asked` has the bodies of what was asked."""

    def __init__(self, words: PreTrainedTokenizerFast, folder: Path) -> None:
        self.words, self.folder = words, folder
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.version = "default"
        self.url = "http://user:" + "secret@127.0.0.1:9"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append((path, body))
        if path in self.answers:
            return self.answers[path](body)
        match path:
            case "/v1/models":
                return 200, {"data": [{"root": STUDENT, "max_model_len": 1024}]}
            case "/weight_info":
                return 200, {"weight_version": self.version}
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/collective_rpc":
                assert (Path(body["kwargs"]["weights_path"]) / "model.safetensors").is_file()
            case "/inference/v1/generate":
                return 200, {"choices": [self.choice([7, 8, 9], 0.0)]}
        return 200, {"success": True}

    def choice(self, ids: list[int], logprob: float) -> dict[str, Any]:
        return {
            "token_ids": ids,
            "finish_reason": "length",
            "logprobs": {"content": [{"token_id": i, "logprob": logprob} for i in ids]},
            "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}],
        }

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def generations(self) -> list[dict[str, Any]]:
        return [body for path, body in self.asked if path == GENERATE]

    def connect(self, source: str = STUDENT) -> VllmServerEngine:
        config = RolloutConfig(
            engine="vllm-server",
            precision="float32",
            weights_folder=str(self.folder / "weights"),
            server=ServerConfig(student=[self.url], attempts=3, timeout=10.0),
        )
        return VllmServerEngine([self.url], source, self.words, config, 1024)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(STUDENT)
    return tokenizer


@pytest.fixture
def nowhere(words: PreTrainedTokenizerFast, tmp_path: Path) -> Pretender:
    """No server listens."""
    return Pretender(words, tmp_path)


@pytest.fixture
def server(nowhere: Pretender) -> Iterator[Pretender]:
    class Server(Handler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            status, content = nowhere.answer(self.path, json.loads(self.rfile.read(length) or b"{}"))
            self.answer(status, {}, json.dumps(content).encode())

        do_GET = do_POST

    with handled(Server) as nowhere.url:
        yield nowhere


def ask(engine: VllmServerEngine) -> list[Generation]:
    return generate(engine, [Request([1, 2], 3, (4, 0)), Request([3], 3, (5, 0))], Sampling(), ("</search>",))


def test_untouched_server_is_left_as_it_is(server: Pretender) -> None:
    engine = server.connect()
    assert ask(engine) == [Generation([7, 8, 9], [0.0] * 3, FinishReason.LENGTH)] * 2
    assert "/collective_rpc" not in server.paths()
    asked = sorted(server.generations(), key=str)
    assert [body["token_ids"] for body in asked[:2]] == [[1, 2], [server.words.eos_token_id]]


def test_refresh_names_weights_first_and_forgets_prefixes_last(server: Pretender) -> None:
    engine = server.connect()
    server.asked.clear()
    engine.refresh(weights_of(load_model(STUDENT)))
    assert server.paths() == ["/update_weight_version", "/collective_rpc", "/reset_prefix_cache"]
    assert list((server.folder / "weights").iterdir()) == [], "weights that were read are deleted"
    assert len(ask(engine)) == 2
    server.answers["/reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(InfrastructureError, match="keeps prefixes"):
        engine.refresh(weights_of(load_model(STUDENT)))


def test_weights_of_another_client_are_noticed(server: Pretender) -> None:
    engine = server.connect()
    server.connect().refresh(weights_of(load_model(STUDENT)))
    with pytest.raises(InfrastructureError, match=r"sampled with weights .*-1 instead of default"):
        ask(engine)
    assert server.version != "default"
    server.asked.clear()
    ask(server.connect())
    assert "/collective_rpc" in server.paths(), "weights that somebody has changed are loaded anew"


def test_failures_are_tried_again_and_are_no_answers(server: Pretender) -> None:
    engine = server.connect()
    choice = server.choice([7], -0.5)
    for failures in ([503, 500], [429, 408]):
        statuses = iter(failures)
        server.answers[GENERATE] = lambda _, left=statuses: (next(left, 200), {"choices": [choice]})  # type: ignore[misc]
        assert [answer.logprobs for answer in ask(engine)] == [[-0.5], [-0.5]]
    server.answers[GENERATE] = lambda _: (500, {"error": "no memory"})
    with pytest.raises(InfrastructureError, match=r"generate failed \(500\).*no memory"):
        ask(engine)
    server.answers[GENERATE] = lambda _: (200, {"choices": [{**choice, "finish_reason": "abort"}]})
    with pytest.raises(InfrastructureError, match="ended a request with 'abort'"):
        ask(engine)


def test_broken_answers_are_failures(server: Pretender) -> None:
    engine = server.connect()
    whole = server.choice([7], -0.5)
    broken: list[dict[str, Any]] = [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{**whole, "logprobs": None}]},
        {"choices": [{**whole, "logprobs": {"content": [{"logprob": None}]}}]},
        {"choices": [{**whole, "logprobs": {"content": [{"logprob": -(10**400)}]}}]},
        {"choices": [{**whole, "token_ids": ["a"]}]},
        {"choices": [{**whole, "weight_versions": [{}]}]},
    ]
    for answer in broken:
        server.answers[GENERATE] = lambda _, answer=answer: (200, answer)  # type: ignore[misc]
        with pytest.raises(InfrastructureError, match="does not answer as vLLM does"):
            ask(engine)
    server.answers["/v1/models"] = lambda _: (200, {"data": []})
    with pytest.raises(InfrastructureError, match="/v1/models does not answer as vLLM does"):
        server.connect()


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        (GENERATE, "raw", "--logprobs-mode processed_logprobs"),
        ("/v1/models", (200, {"data": [{"root": STUDENT, "max_model_len": 512}]}), "max_model_len is 512"),
        (GENERATE, (404, {}), "there is no /inference/v1/generate"),
        (GENERATE, (400, {"error": "bad"}), "refuses /inference/v1/generate"),
    ],
)
def test_servers_with_other_settings_are_refused(
    server: Pretender, path: str, answer: Any, message: str
) -> None:
    raw = (200, {"choices": [server.choice([7], -2.0)]})
    server.answers[path] = lambda _: raw if answer == "raw" else answer
    with pytest.raises(UserError, match=message):
        server.connect()


def test_server_of_another_model_that_allows_no_changes(server: Pretender) -> None:
    server.answers["/weight_info"] = lambda _: (404, {})
    engine = server.connect()
    server.answers["/update_weight_version"] = lambda _: (404, {})
    with pytest.raises(UserError, match="there is no /update_weight_version: start it as"):
        engine.refresh(weights_of(load_model(STUDENT)))
    server.answers["/v1/models"] = lambda _: (200, {"data": [{"root": "other", "max_model_len": 1024}]})
    with pytest.raises(UserError, match=r"serves other, not .*student, and allows no changes"):
        server.connect()


def test_no_server(nowhere: Pretender) -> None:
    with pytest.raises(InfrastructureError, match=r"http://127\.0\.0\.1:9: does not answer"):
        nowhere.connect()


def test_rows_without_a_token_are_asked_not_to_be_sampled(server: Pretender) -> None:
    """The embedded student has none; of a wider model each is named."""
    ask(server.connect())
    assert all(body["sampling_params"].get("logit_bias") is None for body in server.generations())
    server.asked.clear()
    wider, known = load_model(STUDENT), len(server.words)
    wider.resize_token_embeddings(known + 2, mean_resizing=False)
    save_model(wider, server.words, server.folder / "wider")
    ask(server.connect(str(server.folder / "wider")))
    asked = [body["sampling_params"] for body in server.generations()][1:]  # the first one is a check
    assert [fields["logit_bias"] for fields in asked] == [{str(known): -1e9, str(known + 1): -1e9}] * 2
