"""What is worth another try, and what is not: with real errors of the hub's client, from a real server."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.hub import HTTP_ERROR, unreachable
from dgpo_core.retrieval.encoders import _errors_with_model
from tests.conftest import ROOT

LOAD = """
from dgpo_core.models import load_model, load_tokenizer
for load in (load_tokenizer, load_model):
    try:
        load("samples/model")
    except Exception as error:
        print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    status, code = 404, "RepoNotFound"

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def failure(endpoint: str, cache: Path) -> Exception:
    with pytest.raises(Exception) as caught:
        hf_hub_download("samples/model", "config.json", endpoint=endpoint, cache_dir=cache)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code"), [(404, "RepoNotFound"), (403, "GatedRepo"), (404, "EntryNotFound")]
)
def test_what_the_hub_refuses_stays_refused(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(Hub, "status", status)
    monkeypatch.setattr(Hub, "code", code)
    error = failure(hub, tmp_path)
    assert isinstance(error, HfHubHTTPError) and not unreachable(error)


@pytest.mark.thorough
def test_nobody_there(tmp_path: Path) -> None:
    error = failure("http://127.0.0.1:9", tmp_path)
    assert isinstance(error, LocalEntryNotFoundError) and unreachable(error)


def test_wrapped_errors_and_others() -> None:
    """As transformers tells them: an OSError, raised from the hub's."""
    wrapped = OSError("We could not connect")
    wrapped.__cause__ = HTTP_ERROR("the connection broke")
    assert unreachable(wrapped)
    assert not unreachable(OSError("no space left"))
    for error, kind in ((wrapped, InfrastructureError), (OSError("no config.json"), UserError)):
        with (
            pytest.raises(kind, match=r"retrieval\.encoder\.model: cannot load"),
            _errors_with_model(EncoderConfig()),
        ):
            raise error


@pytest.mark.thorough
@pytest.mark.parametrize(("endpoint", "expected"), [("none", "InfrastructureError"), ("hub", "UserError")])
def test_models_on_the_hub(hub: str, tmp_path: Path, endpoint: str, expected: str) -> None:
    """In a process of its own: the hub's client reads its environment when it is imported."""
    offline = {"HF_HUB_OFFLINE": "1"} if endpoint == "none" else {"HF_ENDPOINT": hub}
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=environment | offline, capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [expected] * 2, done.stdout + done.stderr
    assert all("samples/model: cannot load a " in line for line in lines)
