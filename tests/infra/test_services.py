"""Background servers: small real ones for what goes wrong, Prefect's and MLflow's for what they are for."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from dgpo_core.errors import UserError
from infra.services import Service, _last_line, down, mlflow, prefect, state, up
from tasks.project.servers import MARK, ServiceRecord, adopt, leader, members, read, write
from tests.conftest import ROOT, free_port

# A server whose child goes on when it is killed, as uvicorn's workers do.
SERVER = """
import http.server, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def small(name: str = "mlflow", code: str = SERVER) -> Service:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-c", code, str(port)]
    return Service(ServiceRecord(name, "", command, "A_URL", url, url, url), port, "--a-port", {})


def recorded(folder: Path, name: str = "mlflow") -> ServiceRecord:
    record = read(name, folder)
    assert record is not None
    return record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("A_URL", "")  # so that it is taken away again
    monkeypatch.delenv("A_URL")
    yield tmp_path / ".services"
    down(tmp_path / ".services")


@pytest.mark.thorough
def test_up_twice_starts_once_and_down_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = small()
    assert up([service], folder) == ["mlflow"]
    first = recorded(folder)
    assert up([service], folder) == []
    assert "already running" in capsys.readouterr().out
    assert recorded(folder) == first
    assert state(first) == "running"
    processes = members(first)
    assert len(processes) == 2  # the server and its child
    assert down(folder) == ["mlflow"]
    assert not any(process.is_running() for process in processes)
    assert down(folder) == []


def test_a_copied_checkout_neither_uses_nor_ends_the_servers_of_the_original(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = small()
    up([service], folder)
    copied = shutil.copytree(folder, folder.parent / "copy" / ".services")
    adopt(copied)
    assert "A_URL" not in os.environ
    assert down(copied) == []
    assert state(recorded(folder)) == "running"
    with pytest.raises(UserError, match=f"port {service.port} is taken"):
        up([service], copied)
    moved = folder.rename(folder.parent / "moved")
    adopt(moved)
    assert os.environ["A_URL"] == service.record.address
    assert down(moved) == ["mlflow"]


@pytest.mark.thorough
def test_what_a_crash_left_is_ended(folder: Path) -> None:
    service = small()
    up([service], folder)
    record = recorded(folder)
    os.kill(record.pid, signal.SIGKILL)
    os.waitpid(record.pid, 0)
    (orphan,) = members(record)
    assert state(record) == "crashed"
    assert up([service], folder) == ["mlflow"]
    assert not orphan.is_running()
    assert recorded(folder).pid != record.pid


@pytest.mark.thorough
def test_a_stranger_with_the_number_of_a_dead_service_lives(folder: Path) -> None:
    up([small()], folder)
    record = recorded(folder)
    down(folder)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        write(replace(record, pid=stranger.pid, command=psutil.Process(stranger.pid).cmdline()), folder)
        assert state(recorded(folder)) == "crashed"
        assert down(folder) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.thorough
def test_a_started_process_without_a_pid_on_record_is_found(folder: Path) -> None:
    """Whoever ran `dgpo up` was killed between starting the server and writing its number down."""
    up([small()], folder)
    record = recorded(folder)
    write(replace(record, pid=0, began=""), folder)
    assert down(folder) == ["mlflow"]
    assert not psutil.pid_exists(record.pid) or not members(record)


def test_a_taken_port_is_said_with_the_setting(folder: Path) -> None:
    service = small()
    with socket.socket() as other:
        other.bind(("127.0.0.1", service.port))
        other.listen()
        with pytest.raises(UserError, match=f"port {service.port} is taken .* --a-port"):
            up([service], folder)


def test_a_server_that_dies_gives_its_last_words(folder: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow does not start: no such store; see .*mlflow\.log"):
        up([small(code="print('hello', flush=True); raise SystemExit('no such store')")], folder)
    assert read("mlflow", folder) is None


def test_a_server_named_by_the_environment_is_not_doubled(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_URL", "https://user:" + "hidden@mlflow.example")
    assert up([small()], folder) == []
    printed = capsys.readouterr().out
    assert "A_URL names a server" in printed and "hidden" not in printed


def test_a_damaged_record_is_named(folder: Path) -> None:
    folder.mkdir()
    (folder / "mlflow.json").write_text("{")
    with pytest.raises(UserError, match=r"mlflow\.json: not a record"):
        down(folder)
    (folder / "mlflow.json").unlink()


def test_a_log_without_words(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("\n \n")
    assert _last_line(tmp_path / "x.log") == "it wrote nothing"


def test_addresses_are_adopted_below_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = small()
    adopt(folder)
    assert "A_URL" not in os.environ
    up([service], folder)
    adopt(folder)
    assert os.environ["A_URL"] == service.record.address
    monkeypatch.setenv("A_URL", "sqlite:///mine.db")
    adopt(folder)
    assert os.environ["A_URL"] == "sqlite:///mine.db"
    monkeypatch.delenv("A_URL")
    os.kill(recorded(folder).pid, signal.SIGKILL)
    time.sleep(0.2)
    adopt(folder)  # one that is gone is nobody's server
    assert "A_URL" not in os.environ


@pytest.mark.slow
class TestRealServers:
    """Prefect and MLflow, started once."""

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        place = tmp_path_factory.mktemp("place")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(place)
            for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", MARK):
                patch.delenv(name, raising=False)
            try:
                assert up([prefect(free_port()), mlflow(free_port())]) == ["prefect", "mlflow"]
                yield place
            finally:
                down()

    def run(self, place: Path, *command: str) -> str:
        """Run a program as a user does there, without telling it where the servers are."""
        hidden = {"MLFLOW_TRACKING_URI", "PREFECT_API_URL"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(place / "client")}
        return subprocess.check_output(
            [sys.executable, *command], cwd=place, env=environment, text=True, timeout=120
        )

    def test_a_flow_and_a_metric_arrive(self, place: Path) -> None:
        from mlflow import MlflowClient

        program = """
from prefect import flow
from tasks.stages.stage import main
from tasks.tracking.runs import Pipeline, connect

@flow(name="arrives")
def arrives() -> None:
    client = connect()
    parent = Pipeline("arrives")
    client.log_metric(parent.run_id, "em", 0.25)
    print("run", parent.run_id)

main(arrives)
"""
        (place / "arrives.py").write_text(program)
        # through flows.server: Prefect reads its settings when it is imported
        out = self.run(place, "-m", "flows.server", "--", sys.executable, "arrives.py")
        run_id = out.split("run ")[-1].split()[0]
        client = MlflowClient(recorded(Path(".services"), "mlflow").address)
        assert client.get_run(run_id).data.metrics == {"em": 0.25}
        # not by Prefect's client: it keeps the settings with which it was first imported
        address = recorded(Path(".services"), "prefect").address
        runs = httpx.post(f"{address}/flow_runs/filter", json={}, timeout=30).json()
        assert [run["state_name"] for run in runs] == ["Completed"]
        assert (place / "mlflow.db").is_file()  # the store that is used without a server, too

    def test_down_leaves_no_process(self, place: Path) -> None:
        records = [recorded(Path(".services"), name) for name in ("prefect", "mlflow")]
        processes = [process for record in records for process in members(record)]
        assert len(processes) > 2  # workers too
        assert down() == ["prefect", "mlflow"]
        assert not any(process.is_running() for process in processes)
        assert not any(leader(record) for record in records)


def test_where_names_what_runs_and_how_to_get_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line of `make demo`."""
    from infra.services import where_command

    monkeypatch.chdir(tmp_path)
    for variable in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    where_command(4277, 5077)
    said = "dashboards   dgpo ui: mlflow http://127.0.0.1:5077, prefect http://127.0.0.1:4277\n"
    assert capsys.readouterr().out == said
    service = small()
    try:
        up([service])
        capsys.readouterr()
        monkeypatch.setenv("PREFECT_API_URL", "https://me:" + "word@team.example/api")
        where_command()
        url = service.record.page
        assert capsys.readouterr().out == f"dashboards   mlflow {url}, prefect https://team.example\n"
    finally:
        down()
