"""Files on this machine and on a hub: a real HTTP server that answers as the hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dgpo_core.datasets.published import DataFile, _commit, fetch
from dgpo_core.errors import UserError
from tests.samples import SAMPLES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).parents[4]
FETCH = """
import json, sys
from dgpo_core.datasets.published import fetch
for place in sys.argv[1:]:
    try:
        found = fetch(place, "data.published.corpus")
        print(json.dumps({"origin": found.origin, "text": found.path.read_text()}))
    except Exception as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


class Hub(BaseHTTPRequestHandler):
    """The repository samples/wiki with wiki-18.jsonl at COMMIT, which is also main."""

    downloads = 0
    cut = False  # half of the body, and an end to the connection

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        prefix, _, rest = self.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if prefix != "datasets/samples/wiki":
            self.refuse("RepoNotFound")
        elif revision not in ("main", COMMIT):
            self.refuse("RevisionNotFound")
        elif name != "wiki-18.jsonl":
            self.refuse("EntryNotFound")
        else:
            self.send((SAMPLES / name).read_bytes(), body)

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            type(self).downloads += 1
            self.wfile.write(content[: len(content) // 2] if self.cut else content)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.downloads, Hub.cut = 0, False
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fetched(home: Path, endpoint: str, *places: str) -> list[dict[str, str]]:
    """What a fresh process fetches (the hub's client reads its environment when it is imported)."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *places], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.thorough
def test_hub(hub: str, tmp_path: Path) -> None:
    """Downloaded once, with the commit; mistakes name the setting; without a hub the cache serves."""
    pinned = f"hf://datasets/samples/wiki@{COMMIT}/wiki-18.jsonl"
    answers = fetched(
        tmp_path,
        hub,
        "hf://datasets/samples/wiki/wiki-18.jsonl",
        pinned,
        "hf://datasets/samples/wiki/other.jsonl",
        "hf://datasets/samples/wiki@v9/wiki-18.jsonl",
        "hf://datasets/samples/none/wiki-18.jsonl",
    )
    for answer in answers[:2]:
        assert answer == {"origin": pinned, "text": (SAMPLES / "wiki-18.jsonl").read_text()}
    assert Hub.downloads == 1
    for answer, place in zip(answers[2:], ("other.jsonl", "wiki@v9", "samples/none"), strict=True):
        assert answer["error"] == "UserError"
        assert answer["message"].startswith("data.published.corpus: hf://datasets/")
        assert place in answer["message"]
    gone = "http://127.0.0.1:9"
    offline = fetched(tmp_path, gone, pinned, "hf://datasets/samples/wiki/other.jsonl")
    assert offline[0]["origin"] == pinned
    assert offline[1]["error"] == "InfrastructureError"
    assert "cannot reach the hub" in offline[1]["message"]


@pytest.mark.thorough
def test_a_broken_download_is_nobodys_fault_and_can_be_tried_again(hub: str, tmp_path: Path) -> None:
    place = "hf://datasets/samples/wiki/wiki-18.jsonl"
    Hub.cut = True
    (broken,) = fetched(tmp_path, hub, place)
    assert broken["error"] == "InfrastructureError" and "the download failed" in broken["message"]
    Hub.cut = False
    (again,) = fetched(tmp_path, hub, place)
    assert again["text"] == (SAMPLES / "wiki-18.jsonl").read_text()


def test_the_commit_is_read_below_the_hubs_own_folder() -> None:
    """The cache may lie anywhere."""
    cached = f"/mnt/snapshots/datasets--x/hub/datasets--a--b/snapshots/{COMMIT}/nq/test.jsonl"
    assert _commit(Path(cached)) == COMMIT


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert fetch(str(path), "x") == DataFile(path, str(path))
    with pytest.raises(UserError, match=r"data\.published\.nq: .*b\.jsonl: no such file"):
        fetch(str(tmp_path / "b.jsonl"), "data.published.nq")


@pytest.mark.parametrize("place", ["hf://models/a/b/c", "hf://datasets/a/b", "hf://datasets/a/b@", "hf://"])
def test_malformed_places(place: str) -> None:
    with pytest.raises(UserError, match=r"x: hf://.*: must be hf://datasets/<owner>/<name>"):
        fetch(place, "x")
