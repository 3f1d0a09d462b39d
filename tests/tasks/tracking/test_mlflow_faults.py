"""What people are told of an MLflow server that refuses, is another program, or of another version."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dgpo_core.errors import InfrastructureError, UserError
from tasks.tracking.registry import store
from tasks.tracking.store import explained, require_answer

SECRET = "pass" + "word-of-mine"


@contextmanager
def server(status: int, body: object, version: str | None = None) -> Iterator[str]:
    """A server that is alive, answers every request of MLflow's client alike, and may say a version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = {"/health": (200, b"OK"), "/version": (200, (version or "").encode())}
            if self.path == "/version" and version is None:
                known.pop("/version")
            code, content = known.get(self.path, (status, json.dumps(body).encode()))
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Silent."""

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()


def failure(url: str, patch: pytest.MonkeyPatch) -> UserError | InfrastructureError:
    patch.setenv("MLFLOW_TRACKING_URI", url)
    with pytest.raises((UserError, InfrastructureError)) as caught, store():
        pass
    said = caught.value
    assert isinstance(said, UserError | InfrastructureError) and "\n" not in str(said)
    return said


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_says_what_it_wants(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    denied = {"error_code": "PERMISSION_DENIED", "message": f"Permission denied for me:{SECRET}"}
    with server(status, denied) as url:
        said = failure(url.replace("//", f"//me:{SECRET}@"), monkeypatch)
    assert isinstance(said, UserError)
    assert "refuses" in str(said) and "MLFLOW_TRACKING_PASSWORD" in str(said)
    assert SECRET not in str(said)


def test_a_server_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(404, {"error_code": "ENDPOINT_NOT_FOUND", "message": "no such endpoint"}, "2.3.0") as url:
        said = failure(url, monkeypatch)
    assert isinstance(said, InfrastructureError)
    assert "the server is MLflow 2.3.0, this is 3." in str(said)


def test_another_program_at_the_address_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(404, "<html>somebody's page</html>") as url:
        assert f"is {url} an MLflow server?" in str(failure(url, monkeypatch))


def test_no_answer_is_told_in_seconds() -> None:
    started = time.monotonic()
    for nowhere in ("http://127.0.0.1:9", "http://no-such-host.invalid:5000"):
        with pytest.raises(InfrastructureError, match="does not answer"):
            require_answer(nowhere)
    assert time.monotonic() - started < 15
    require_answer("sqlite:////not/a/server.db")


def test_what_we_said_already_is_not_said_again() -> None:
    mine = UserError("dvc.lock: broken")
    assert explained(mine) is mine
