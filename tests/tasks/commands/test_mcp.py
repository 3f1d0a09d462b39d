"""`dgpo mcp` as a process on its input and output, and what keeps it from starting."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.datasets.records import read_questions
from dgpo_core.errors import UserError
from tasks.commands import mcp as command
from tests.conftest import ROOT
from tests.tasks.commands.test_serve import dgpo


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.thorough
@pytest.mark.anyio
async def test_a_client_of_the_official_sdk_over_stdio(indexed_project: Path) -> None:
    sdk = pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    question = read_questions(indexed_project / "data/questions/onehop/test.jsonl")[0].question
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = sdk.StdioServerParameters(
        command=sys.executable,
        args=["-m", "tasks.commands.cli", "mcp", "--model", "teacher"],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=str(indexed_project),
    )
    async with sdk.Client(server) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == {"ask", "search"}
        found = await client.call_tool("search", {"query": question})
        assert found.structured_content["passages"]
        asked = await client.call_tool("ask", {"question": question})
        assert asked.structured_content["searches"] and not asked.is_error


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_although_its_input_stays_open(
    indexed_project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pytest.importorskip("mcp", reason="the extra `mcp` is not installed")
    params = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "t", "version": "1"},
    }
    hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    with dgpo("mcp --model teacher", indexed_project, tmp_path, subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(hello) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "dgpo"
        process.send_signal(number)
        assert process.wait(100) == 128 + number
    assert list(tmp_path.glob("dgpo-qdrant-*")) == [], "the index's temporary folder"


def test_without_the_package_it_says_how_to_install_it(
    indexed_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(indexed_project)
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    monkeypatch.delitem(sys.modules, "dgpo_core.serving.mcp_server", raising=False)
    with pytest.raises(UserError, match=r"pip install -c constraints/main.txt -e '\.\[mcp\]'"):
        command.mcp("teacher", "127.0.0.1", None)
    with pytest.raises(UserError, match="--allow-host http://x: a name without"):
        command.mcp("teacher", "127.0.0.1", None, ["http://x"])
