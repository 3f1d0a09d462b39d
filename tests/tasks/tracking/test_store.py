"""MLflow's store: a local one is whole or not there, at home where it was put; what is told of servers."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from dgpo_core.errors import InfrastructureError, UserError
from tasks.stages.stage import stage
from tasks.tracking.registry import store
from tasks.tracking.runs import connect, start_run
from tasks.tracking.store import (
    artifact_root,
    condition,
    explained,
    local_path,
    moved_from,
    prepare,
    require_answer,
    revisions,
    tracking_uri,
)
from tests.conftest import ROOT
from tests.tasks.web import answering

OLDER = "c1d2e3f4a5b6"  # a migration in which a process was once killed
MAKE = "import sys; from tasks.tracking.store import prepare; prepare(sys.argv[1])"


def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def making(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", MAKE, uri(folder)]
    return subprocess.Popen(
        command, cwd="/", env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as store, store:
        for statement in statements:
            store.execute(statement)


@pytest.fixture
def checkout(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a store in which two runs have artifacts; its name is an odd one."""
    folder = tmp_path / "a check-out ü"
    folder.mkdir()
    shutil.copyfile(empty_store, folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(folder))
    monkeypatch.chdir(tmp_path)  # a stage may work anywhere
    client = connect()
    for name in ("one", "two"):
        client.log_text(start_run(client, name, {"kind": "test"}), name, "sub/name.txt")
    client.create_registered_model("m")
    run = client.search_runs(["1"], "attributes.run_name = 'one'")[0]
    client.create_model_version("m", f"{run.info.artifact_uri}/sub", run.info.run_id)
    yield folder


def texts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What every run of the store has kept, read as anybody would."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(folder))
    client = connect()
    return {
        str(run.info.run_name): Path(client.download_artifacts(run.info.run_id, "sub/name.txt")).read_text()
        for run in client.search_runs(["1"])
    }


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")}


def test_artifacts_are_kept_beside_the_store_whatever_the_working_directory(
    checkout: Path, tmp_path: Path
) -> None:
    assert len(files(checkout / "mlruns")) == 2
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_store_goes_with_its_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    there = checkout.with_name("there")
    (shutil.copytree if how == "copied" else shutil.move)(checkout, there)
    before = files(checkout) if how == "copied" else set()
    capsys.readouterr()
    assert texts(there, monkeypatch) == {"one": "one", "two": "two"}
    assert f"copied or moved here from {checkout}" in capsys.readouterr().err
    client = connect()
    version = client.get_model_version("m", "1")
    assert str(version.source).startswith((there / "mlruns").as_uri())
    client.log_text(start_run(client, "three", {}), "three", "sub/name.txt")
    assert len(files(there / "mlruns")) == 3
    assert (files(checkout) if how == "copied" else set()) == before
    assert how == "copied" or not checkout.exists()
    assert "copied" not in capsys.readouterr().err, "it is said once"
    if how == "copied":
        assert texts(checkout, monkeypatch) == {"one": "one", "two": "two"}


def test_a_store_without_its_artifacts_leaves_them_where_they_are(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody copied the file alone: what was kept is still found, and what is new is kept here."""
    there = checkout.with_name("there")
    there.mkdir()
    shutil.copyfile(checkout / "mlflow.db", there / "mlflow.db")
    assert texts(there, monkeypatch) == {"one": "one", "two": "two"}
    client = connect()
    client.log_text(start_run(client, "three", {}), "three", "sub/name.txt")
    assert len(files(there)) == 1 and len(files(checkout)) == 2


def test_a_folder_chosen_for_artifacts_stays(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = checkout.with_name("chosen")
    shutil.move(checkout / "mlruns", chosen)
    old, new = artifact_root(checkout / "mlflow.db").as_uri(), chosen.as_uri()
    execute(
        checkout / "mlflow.db",
        f"UPDATE experiments SET artifact_location = '{new}' WHERE name = 'dgpo'",
        f"UPDATE runs SET artifact_uri = replace(artifact_uri, '{old}', '{new}')",
    )
    assert moved_from(checkout / "mlflow.db") is None
    assert texts(checkout, monkeypatch) == {"one": "one", "two": "two"}


@pytest.mark.thorough
@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("size", [0, 1, 400_000])
def test_a_kill_at_any_moment_leaves_no_store_or_a_whole_one(
    tmp_path: Path, size: int, whole_group: bool
) -> None:
    """At the start, in the first tables, and in the middle of the migrations."""

    def grown() -> int:
        return max((path.stat().st_size for path in tmp_path.glob("*-making-*/mlflow.db")), default=-1)

    process = making(tmp_path)
    while grown() < size and process.poll() is None:
        time.sleep(0.01)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    assert condition(tmp_path / "mlflow.db") == "absent"
    prepare(uri(tmp_path))
    assert condition(tmp_path / "mlflow.db") == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


@pytest.mark.thorough
def test_of_two_that_start_together_one_makes_the_store(tmp_path: Path) -> None:
    processes = [making(tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        names = store.execute("SELECT name FROM experiments ORDER BY experiment_id").fetchall()
    assert names == [("Default",), ("dgpo",)]


@pytest.fixture(scope="module")
def half_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MLflow leaves when it is killed in its migrations."""
    import sqlalchemy
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base

    path = tmp_path_factory.mktemp("half") / "mlflow.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(str(engine.url))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, OLDER)
    engine.dispose()
    return path


def test_a_half_made_store_is_named_with_its_cure(
    tmp_path: Path, half_made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mlflow.db"
    shutil.copyfile(half_made, path)
    assert condition(path) == "half-made"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with stage("train", config={}) as run:
        run.metrics(1, {"em": 0.5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MLflow does not record this run: ")
    assert f"rm {path}" in line
    assert path.read_bytes() == half_made.read_bytes(), "to delete it is for people"
    path.unlink()
    with stage("train", config={}):
        pass
    assert condition(path) == "whole"


@pytest.mark.parametrize(
    ("revision", "found", "cure"),
    [(OLDER, "older", "mlflow db upgrade sqlite:///"), ("ffffffffffff", "newer", "install that MLflow")],
)
def test_a_store_of_another_mlflow_is_left_alone(
    tmp_path: Path, empty_store: Path, revision: str, found: str, cure: str
) -> None:
    """MLflow itself would change the tables of an older one at once, in whatever process comes first."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, path)
    execute(path, f"UPDATE alembic_version SET version_num = '{revision}'")
    before = path.read_bytes()
    assert condition(path) == found
    with pytest.raises(UserError, match=cure):
        prepare(uri(tmp_path))
    assert path.read_bytes() == before


def test_the_newest_schema_is_the_one_that_mlflow_makes(empty_store: Path) -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    head, known = revisions()
    assert head == _get_latest_schema_revision()
    assert {head, OLDER} < known
    assert condition(empty_store) == "whole"


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("somebody's notes, long enough to be taken for a header of a database" * 20)
    with pytest.raises(UserError, match="this is no store of MLflow's: move it away"):
        prepare(uri(tmp_path))
    path.unlink()
    execute(path, "CREATE TABLE recipes (cake)")
    with pytest.raises(UserError, match="this is no store of MLflow's"):
        prepare(uri(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(InfrastructureError, match="cannot be used here"):
        prepare(uri(tmp_path))


def test_only_files_are_looked_at() -> None:
    for other in ("http://host:5000", "postgresql://u@host/db", "sqlite:///:memory:", "databricks", ""):
        assert local_path(other) is None
        prepare(other)
    assert local_path("sqlite:////a/b c.db") == Path("/a/b c.db")


def test_a_folder_that_no_address_can_name_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "what?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"what\?/mlflow.db: .* rename it"):
        prepare(tracking_uri())
    assert list(tmp_path.iterdir()) == [folder]


SECRET = "pass" + "word-of-mine"


def server(status: int, body: object, version: str = "") -> AbstractContextManager[str]:
    """A server that is alive, answers every request of MLflow's client alike, and may say a version."""
    known = {"/health": (200, b"OK")} | ({"/version": (200, version.encode())} if version else {})
    return answering(lambda path, _: known.get(path, (status, json.dumps(body).encode())))


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
