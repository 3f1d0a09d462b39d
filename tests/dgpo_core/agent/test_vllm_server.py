"""The HTTP client against a server that answers as told (a real vLLM is in test_vllm_engines.py)."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.engine import FinishReason, Generation, Request, weights_of
from dgpo_core.agent.vllm_server import VllmServerEngine
from dgpo_core.config.agent import RolloutConfig, Sampling, ServerConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.models import load_model, load_tokenizer, save_model

STUDENT = str(Path(__file__).resolve().parents[3] / "models" / "student")
Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


class Pretender:
    """Answers each path; `answers` replaces some of them, `asked` has the bodies of what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.version = "default"

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


@pytest.fixture
def server() -> Iterator[tuple[Pretender, str]]:
    pretender = Pretender()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            status, content = pretender.answer(self.path, json.loads(self.rfile.read(length) or b"{}"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield pretender, f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(STUDENT)
    return tokenizer


def connect(url: str, words: PreTrainedTokenizerFast, folder: Path, context: int = 1024) -> VllmServerEngine:
    config = RolloutConfig(
        engine="vllm-server",
        precision="float32",
        weights_folder=str(folder),
        server=ServerConfig(student=[url], attempts=3, timeout=10.0),
    )
    return VllmServerEngine([url], STUDENT, words, config, context)


def ask(engine: VllmServerEngine) -> list[Generation]:
    return engine.generate([Request([1, 2], 3, (4, 0)), Request([3], 3, (5, 0))], Sampling(), ("</search>",))


def test_untouched_server_is_left_as_it_is(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    engine = connect(url, words, tmp_path)
    assert ask(engine) == [Generation([7, 8, 9], [0.0] * 3, FinishReason.LENGTH)] * 2
    assert "/collective_rpc" not in pretender.paths()
    asked = sorted((body for path, body in pretender.asked if path.endswith("generate")), key=str)
    assert [body["token_ids"] for body in asked[:2]] == [[1, 2], [words.eos_token_id]]


def test_refresh_names_weights_first_and_forgets_prefixes_last(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    engine = connect(url, words, tmp_path)
    pretender.asked.clear()
    engine.refresh(weights_of(load_model(STUDENT)))
    assert pretender.paths() == ["/update_weight_version", "/collective_rpc", "/reset_prefix_cache"]
    assert list(tmp_path.iterdir()) == [], "weights that were read are deleted"
    assert len(ask(engine)) == 2
    pretender.answers["/reset_prefix_cache"] = lambda _: (200, {"success": False})
    with pytest.raises(InfrastructureError, match="keeps prefixes"):
        engine.refresh(weights_of(load_model(STUDENT)))


def test_weights_of_another_client_are_noticed(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    engine = connect(url, words, tmp_path)
    connect(url, words, tmp_path).refresh(weights_of(load_model(STUDENT)))
    with pytest.raises(InfrastructureError, match=r"sampled with weights .*-1 instead of default"):
        ask(engine)
    assert pretender.version != "default"
    pretender.asked.clear()
    ask(connect(url, words, tmp_path))
    assert "/collective_rpc" in pretender.paths(), "weights that somebody has changed are loaded anew"


def test_failures_are_tried_again_and_are_no_answers(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    engine = connect(url, words, tmp_path)
    failures = iter([503, 500])

    def sometimes(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status = next(failures, 200)
        return status, {"choices": [pretender.choice([7], -0.5)]}

    pretender.answers["/inference/v1/generate"] = sometimes
    assert [answer.logprobs for answer in ask(engine)] == [[-0.5], [-0.5]]
    pretender.answers["/inference/v1/generate"] = lambda _: (500, {"error": "no memory"})
    with pytest.raises(InfrastructureError, match=r"generate failed \(500\).*no memory"):
        ask(engine)
    aborted = {**pretender.choice([7], -0.5), "finish_reason": "abort"}
    pretender.answers["/inference/v1/generate"] = lambda _: (200, {"choices": [aborted]})
    with pytest.raises(InfrastructureError, match="ended a request with 'abort'"):
        ask(engine)
    overloaded = iter([429, 408])
    pretender.answers["/inference/v1/generate"] = lambda _: (
        next(overloaded, 200),
        {"choices": [pretender.choice([7], -0.5)]},
    )
    assert [answer.token_ids for answer in ask(engine)] == [[7], [7]]


def test_broken_answers_are_failures(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    engine = connect(url, words, tmp_path)
    whole = pretender.choice([7], -0.5)
    broken: list[dict[str, Any]] = [
        {},
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{**whole, "logprobs": None}]},
        {"choices": [{**whole, "logprobs": {"content": [{"logprob": None}]}}]},
        {"choices": [{**whole, "token_ids": ["a"]}]},
        {"choices": [{**whole, "weight_versions": [{}]}]},
    ]
    for answer in broken:
        pretender.answers["/inference/v1/generate"] = lambda _, answer=answer: (200, answer)  # type: ignore[misc]
        with pytest.raises(InfrastructureError, match="does not answer as vLLM does"):
            ask(engine)
    pretender.answers["/v1/models"] = lambda _: (200, {"data": []})
    with pytest.raises(InfrastructureError, match="/v1/models does not answer as vLLM does"):
        connect(url, words, tmp_path)


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/inference/v1/generate", "raw", "--logprobs-mode processed_logprobs"),
        ("/v1/models", (200, {"data": [{"root": STUDENT, "max_model_len": 512}]}), "max_model_len is 512"),
        ("/inference/v1/generate", (404, {}), "there is no /inference/v1/generate"),
        ("/inference/v1/generate", (400, {"error": "bad"}), "refuses /inference/v1/generate"),
    ],
)
def test_servers_with_other_settings_are_refused(
    server: tuple[Pretender, str],
    words: PreTrainedTokenizerFast,
    tmp_path: Path,
    path: str,
    answer: Any,
    message: str,
) -> None:
    pretender, url = server
    raw = (200, {"choices": [pretender.choice([7], -2.0)]})
    pretender.answers[path] = lambda _: raw if answer == "raw" else answer
    with pytest.raises(UserError, match=message):
        connect(url, words, tmp_path)


def test_server_of_another_model_that_allows_no_changes(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    pretender, url = server
    pretender.answers["/weight_info"] = lambda _: (404, {})
    engine = connect(url, words, tmp_path)
    pretender.answers["/update_weight_version"] = lambda _: (404, {})
    with pytest.raises(UserError, match="there is no /update_weight_version: start it as"):
        engine.refresh(weights_of(load_model(STUDENT)))
    pretender.answers["/v1/models"] = lambda _: (200, {"data": [{"root": "other", "max_model_len": 1024}]})
    with pytest.raises(UserError, match=r"serves other, not .*student, and allows no changes"):
        connect(url, words, tmp_path)


def test_no_server(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match=r"http://127\.0\.0\.1:9: does not answer"):
        connect("http://user:" + "secret@127.0.0.1:9", words, tmp_path)


def test_rows_without_a_token_are_asked_not_to_be_sampled(
    server: tuple[Pretender, str], words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The embedded student has none; of a wider model each is named."""
    pretender, url = server
    ask(connect(url, words, tmp_path))
    assert all(body["sampling_params"].get("logit_bias") is None for _, body in generations(pretender))
    pretender.asked.clear()
    wider = load_model(STUDENT)
    wider.resize_token_embeddings(len(words) + 2, mean_resizing=False)
    save_model(wider, words, tmp_path / "wider")
    config = RolloutConfig(engine="vllm-server", precision="float32", weights_folder=str(tmp_path / "w"))
    ask(VllmServerEngine([url], str(tmp_path / "wider"), words, config, 1024))
    asked = [body["sampling_params"] for _, body in generations(pretender)][1:]  # the first one is a check
    assert [fields["logit_bias"] for fields in asked] == [
        {str(len(words)): -1e9, str(len(words) + 1): -1e9}
    ] * 2


def generations(pretender: Pretender) -> list[tuple[str, dict[str, Any]]]:
    return [(path, body) for path, body in pretender.asked if path.endswith("generate")]
