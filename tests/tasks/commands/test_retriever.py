"""`dgpo retriever` as a process: loading, concurrent searches, its end; and what keeps it from starting."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from dgpo_core.retrieval.index import open_index
from dgpo_core.retrieval.shards import read_manifest
from tasks.commands.retriever import retriever
from tests.conftest import free_port
from tests.tasks.commands.test_serve import dgpo, wait_until_ready
from tests.tasks.miniature import make_project


@pytest.mark.thorough
def test_it_loads_answers_many_at_once_and_finishes_what_it_has_begun(
    indexed_project: Path, tmp_path: Path
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    digest = read_manifest(indexed_project / "data/index").digest
    with dgpo(f"retriever --port {port}", indexed_project, tmp_path) as process:
        assert set(wait_until_ready(process, url)) <= {503, 200}
        config = load_params(indexed_project / "params.yaml").retrieval
        asked = [f"director of the film number {i}" for i in range(40)]
        ours = open_index(indexed_project / "data/index", config).search(asked, 3)
        remote = config.model_copy(update={"location": f"retriever+{url}"})
        served = open_index(indexed_project / "data/index", remote)
        assert served.digest == digest
        assert served.search(asked, 3) == ours

        def ask(query: str) -> tuple[int, str | None]:
            response = httpx.post(f"{url}/retrieve", json={"queries": [query]}, timeout=60)
            return response.status_code, response.headers.get("x-index-digest")

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(ask, asked)) == {(200, digest)}
        last = HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"queries": asked * 200})
        last.request(
            "POST", "/retrieve", body, {"content-type": "application/json"}
        )  # returns when all is sent
        httpx.get(f"{url}/health", timeout=60)  # so it has been received
        process.send_signal(signal.SIGTERM)
        assert len(json.loads(last.getresponse().read())["result"]) == 40 * 200
        last.close()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.splitlines()[-1] == f"the retriever answers at {url} (Ctrl-C ends it)"
    assert err == ""
    assert list(tmp_path.iterdir()) == [], "the index's temporary folder"


def test_what_keeps_it_from_starting(
    indexed_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_project(tmp_path, retrieval={"location": "retriever+http://127.0.0.1:9"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is a retriever service itself; name the index .* --location"):
        retriever(None, "127.0.0.1", 0)
    with pytest.raises(UserError, match="--location: must be"):
        retriever("ftp://somewhere", "127.0.0.1", 0)
    with pytest.raises(UserError, match="run the index stage first"):
        retriever("embedded", "127.0.0.1", 0)
    (tmp_path / "data").symlink_to(indexed_project / "data")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot listen there"):
            retriever("embedded", "127.0.0.1", port)
    with pytest.raises(SystemExit) as ended:
        retriever("http://127.0.0.1:9", "127.0.0.1", 0)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith(
        "error: the index is not there: cannot fill the Qdrant collection"
    )
