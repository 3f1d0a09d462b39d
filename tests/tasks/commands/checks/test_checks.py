"""Single checks on real files, sockets, servers, and a program that answers as nvidia-smi does."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.service import RetrieverService, make_app
from tasks.commands.checks.environment import packages
from tasks.commands.checks.finding import ok
from tasks.commands.checks.hub import hub, in_cache
from tasks.commands.checks.machine import holders, machine
from tasks.commands.checks.repository import default_remote, repository
from tasks.commands.checks.services import named, port
from tests.dgpo_core.retrieval.test_service import served
from tests.tasks.miniature import ROOT


def profile(name: str) -> Params:
    return Params.model_validate(resolve_profile(ROOT / f"profiles/{name}.yaml"))


def nvidia_smi(folder: Path, patch: pytest.MonkeyPatch, gpus: str, processes: str = "") -> None:
    """Put a program of that name first in the path."""
    script = folder / "nvidia-smi"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in *compute-apps*) printf "{processes}" ;; *) printf "{gpus}" ;; esac\n'
    )
    script.chmod(0o755)
    patch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_versions_are_compared_with_the_tested_ones(tmp_path: Path) -> None:
    constraints = tmp_path / "main.txt"
    constraints.write_text("pydantic==1.0  # old\nHuggingFace.Hub==0.1\nnothing-of-ours==3\n")
    (found,) = packages(constraints)
    assert found.level == "warning" and "(1.0)" in found.message and "nothing" not in found.message
    assert packages(tmp_path / "none.txt")[0].level == "ok"


def test_gpus_that_are_free_or_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 20, 580.1\\nNVIDIA H200, 143771, 90000, 580.1\\n")
    found = {f.subject: f for f in machine(profile("paper-qwen-3b"))}
    assert found["GPU 0"].level == "ok" and "driver 580.1" in found["GPU 0"].message
    assert found["GPU 1"].level == "warning" and "52.5 of 140.4 GiB free" in found["GPU 1"].message
    assert "GPU memory" not in found


def test_a_profile_that_does_not_fit_says_which_setting_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA A100, 40960, 20, 580.1\\n")
    wrong = [f for f in machine(profile("paper-qwen-3b")) if f.level == "error" and f.subject == "GPU memory"]
    assert any("reinforce@dgpo needs" in f.message for f in wrong)
    assert any("compute.micro_batch_tokens: " in f.advice for f in wrong)


def test_an_encoder_of_unknown_shape_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 20, 580.1\\n" * 8)
    found = {f.subject: f for f in machine(profile("paper-qwen-3b"))}
    assert "plan" not in found
    encoder = {"kind": "sentence-transformers", "model": "somebody/an-encoder"}
    found = {f.subject: f for f in machine(with_retrieval(profile("paper-qwen-3b"), encoder=encoder))}
    assert found["plan"].level == "warning" and "planned as if it were" in found["plan"].message
    assert "disk" in found


def test_a_left_over_engine_is_named_by_its_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import subprocess, sys\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(300)', 'vllm']\n"
        "print(subprocess.Popen(child, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    parent = [sys.executable, "-c", code]
    done = subprocess.run(parent, capture_output=True, text=True, check=True, timeout=60)
    orphan = int(done.stdout)
    try:
        nvidia_smi(tmp_path, monkeypatch, "", f"{orphan}, 70000\\n")
        (found,) = holders()
        assert f"process {orphan} holds 70000 MiB" in found.message
        parents = Path(f"/proc/{orphan}/stat").read_text().split()
        if parents[3] == "1":  # a subreaper may have taken it instead
            assert found.level == "error" and found.advice.startswith(f"kill {orphan}")
    finally:
        subprocess.run(["kill", "-9", str(orphan)], check=True)


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that knows everything but gated models without a token."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            gated = "meta-llama" in self.path and self.headers.get("Authorization") != "Bearer good"
            self.send_response(404 if "unknown" in self.path else 403 if gated else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "/nonexistent")
    yield constants.ENDPOINT
    server.shutdown()


def test_models_on_the_hub(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f.subject: f for f in hub(profile("paper-qwen-3b"))}
    assert found["hub"].level == "ok" and found["models.student"].level == "warning"
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct" in found["models.student"].advice
    gated = {f.subject: f for f in hub(profile("paper-llama-8b"))}
    assert gated["models.teacher"].level == "error" and "there is no token" in gated["models.teacher"].message
    monkeypatch.setenv("HF_TOKEN", "bad")
    refused = {f.subject: f for f in hub(profile("paper-llama-8b"))}
    assert "this token may not read it" in refused["models.student"].message
    monkeypatch.setenv("HF_TOKEN", "good")
    assert all(f.level != "error" for f in hub(profile("paper-llama-8b")))
    params = profile("paper-qwen-3b")
    other = params.model_copy(update={"models": params.models.model_copy(update={"student": "un/unknown"})})
    wrong = {f.subject: f for f in hub(other)}
    assert wrong["models.student"].level == "error" and "404" in wrong["models.student"].message


def with_data(params: Params, **published: object) -> Params:
    data = params.data.model_copy(update={"published": params.data.published.model_copy(update=published)})
    return params.model_copy(update={"data": data})


def test_data_sets_on_the_hub_and_here(endpoint: str, tmp_path: Path) -> None:
    params = profile("paper-qwen-3b")
    found = {f.subject: f for f in hub(params)}
    assert found["data.published.questions"].message == "9 of 9 files are not here yet"
    assert found["data.published.musique"].level == found["data.published.corpus"].level == "warning"
    assert "data.published.nq" not in found  # none is given
    wrong = with_data(params, corpus="hf://datasets/un/unknown/corpus.jsonl")
    refused = {f.subject: f for f in hub(wrong)}["data.published.corpus"]
    assert refused.level == "error" and "404" in refused.message
    bad = with_data(params, corpus="hf://un/known/corpus.jsonl", nq=[str(tmp_path / "none.jsonl")])
    local = {f.subject: f for f in hub(bad)}
    assert "must be hf://datasets" in local["data.published.corpus"].message
    assert "no such file" in local["data.published.nq"].message
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("")
    assert {f.subject: f.level for f in hub(with_data(params, corpus=str(corpus)))}[
        "data.published.corpus"
    ] == "ok"
    assert not any(f.subject.startswith("data.") for f in hub(profile("tiny")))


def with_retrieval(params: Params, **retrieval: object) -> Params:
    content = params.model_dump(mode="json")
    content["retrieval"] |= retrieval
    return Params.model_validate(content)


def test_encoders_and_published_indexes_on_the_hub(endpoint: str) -> None:
    params, tiny = profile("paper-qwen-3b"), profile("tiny")
    encoder = {"kind": "sentence-transformers", "model": "somebody/an-encoder"}
    parts = [f"hf://datasets/PeterJinGo/wiki-18-e5-index/part_{name}" for name in ("aa", "ab")]
    found = {f.subject: f for f in hub(with_retrieval(params, encoder=encoder, vectors=parts))}
    assert "somebody/an-encoder is not here yet" in found["retrieval.encoder.model"].message
    assert found["retrieval.vectors"].message == "2 of 2 files are not here yet"
    unknown = {
        f.subject: f
        for f in hub(with_retrieval(tiny, encoder=encoder, vectors=["hf://datasets/un/unknown/x"]))
    }
    assert unknown["retrieval.vectors"].level == "error" and "404" in unknown["retrieval.vectors"].message
    for without in ({"encoder": {"kind": "bm25"}}, {"location": "retriever+http://retriever:8000"}):
        subjects = {f.subject for f in hub(with_retrieval(params, **without))}
        assert "retrieval.encoder.model" not in subjects and "retrieval.vectors" not in subjects


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = {f.subject: f for f in hub(profile("paper-qwen-3b"))}
    assert found["hub"].level == found["models.student"].level == "error"
    assert "is not in the cache" in found["data.published.questions"].message


def test_no_hubs_name_is_not_in_the_cache() -> None:
    assert not in_cache("a/b/c/d") and not in_cache("somebody/never-downloaded")


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        monkeypatch.setenv("QDRANT_PORT", str(number))
        busy = port("Qdrant", "QDRANT_PORT", 6333)
        assert busy.level == "warning" and "QDRANT_PORT" in busy.advice and "process" in busy.message
    assert port("Qdrant", "QDRANT_PORT", 6333).level == "ok"


@contextmanager
def answering(statuses: dict[str, int]) -> Iterator[str]:
    """A server that answers GET of each path with its status, and of every other one with 401."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 401))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


NOWHERE = "http://127.0.0.1:9"


def with_servers(**rollout: object) -> Params:
    params = profile("paper-qwen-3b").model_dump(mode="json")
    params["rollout"]["server"] = rollout
    params["retrieval"]["location"] = "embedded"
    return Params.model_validate(params)


def with_location(location: str) -> Params:
    return with_retrieval(profile("tiny"), location=location)


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_the_environments_servers_must_answer_and_passwords_are_not_shown(
    no_variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:" + "secret@127.0.0.1:9/?token=secret")
    (found,) = named(profile("tiny"))
    assert found.subject == "MLFLOW_TRACKING_URI" and found.level == "error"
    assert "http://127.0.0.1:9 does not answer" in found.message and "secret" not in found.message
    with answering({"/health": 200}) as url:  # everything else wants a password, as a team's MLflow does
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//me:" + "secret@"))
        assert named(profile("tiny"))[0] == ok("MLFLOW_TRACKING_URI", f"{url} answers")


def test_a_retriever_service_is_asked_for_its_health(no_variables: None) -> None:
    loading = RetrieverService(top_k=3)
    with served(make_app(loading)) as url:
        (early,) = named(with_location(f"retriever+{url}"))
        assert early.level == "warning" and "answers 503 to GET /health" in early.message
        loading.open(index_passages([Passage("1", "A", "text")], EncoderConfig(kind="bm25")), 1)
        (ready,) = named(with_location(f"retriever+{url}/"))
        assert ready == ok("retrieval.location", f"{url} answers")
        loading.close()
    with answering({"/health": 404}) as url:  # Search-R1's
        assert named(with_location(f"retriever+{url}"))[0].level == "ok"
    (absent,) = named(with_location(f"retriever+{NOWHERE}"))
    assert absent.level == "warning" and "dgpo retriever" in absent.advice


def test_a_qdrant_server_may_be_started_after_this_command(no_variables: None) -> None:
    (absent,) = named(with_location(NOWHERE))
    assert absent.level == "warning" and "paper-scale.md" in absent.advice
    with answering({"/healthz": 200}) as url:
        assert named(with_location(url))[0].level == "ok"
    assert named(with_location("embedded")) == []


def test_every_server_of_vllm_is_looked_at(no_variables: None) -> None:
    with answering({"/health": 200}) as one, answering({"/health": 200}) as two:
        student, teacher = named(with_servers(student=[one, two], teacher=[one, NOWHERE]))
        assert student == ok("rollout.server.student", f"{one}, {two} answer")
        assert teacher.subject == "rollout.server.teacher" and teacher.level == "warning"
        assert NOWHERE in teacher.message and one not in teacher.message
        assert "start vLLM there" in teacher.advice
    none, _ = named(with_servers(teacher=[NOWHERE]))
    assert none.level == "error" and none.message == "names no server"
    unused = with_servers(student=[NOWHERE], teacher=[NOWHERE])
    rollout = unused.rollout.model_copy(update={"engine": "transformers"})
    assert named(unused.model_copy(update={"rollout": rollout})) == []


def test_repository(dvc_repository: Path) -> None:
    found = {f.subject: f for f in repository(profile("paper-qwen-3b"))}
    assert found["DVC"].level == "warning" and found["git origin"].level == "warning"
    (dvc_repository / ".dvc/config.local").write_text(
        "[core]\n    remote = team\n['remote \"team\"']\n    url = s3://b/x\n"
    )
    assert default_remote(dvc_repository) == ("team", "s3://b/x")
    on_one_machine = {f.subject: f for f in repository(profile("tiny"))}
    assert on_one_machine["DVC"].level == "ok" and "git origin" not in on_one_machine


def test_outside_of_a_repository(workplace: Path) -> None:
    (found,) = repository(profile("tiny"))
    assert found.level == "error" and found.subject == "git"
