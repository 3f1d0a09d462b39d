"""What `dgpo doctor` finds of MLflow's store: real files, and servers that answer as MLflow's does."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tasks.commands.checks.finding import Finding
from tasks.commands.checks.store import store
from tasks.tracking.runs import connect
from tests.tasks.commands.checks.test_checks import profile
from tests.tasks.conftest import empty_store, own_store  # noqa: F401  fixtures
from tests.tasks.tracking.test_mlflow_faults import server

NAMED, STORE, PLACES = "MLflow's experiment dgpo", "MLflow's store", "MLflow's artifacts"


def found() -> dict[str, Finding]:
    return {finding.subject: finding for finding in store(profile("tiny"))}


def test_a_store_that_is_well(own_store: Path) -> None:  # noqa: F811
    connect()
    assert {finding.level for finding in found().values()} == {"ok"}
    assert found().keys() == {STORE, NAMED, PLACES}


def test_no_store_is_well_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (only,) = found().values()
    assert only.level == "ok" and "made by the first run" in only.message
    assert not list(workplace.iterdir()), "a doctor changes nothing"


def test_what_was_deleted_copied_or_broken_has_its_cure(own_store: Path) -> None:  # noqa: F811
    database = own_store.parent / "mlflow.db"
    assert found()[PLACES].level == "warning" and "copied or moved here" in found()[PLACES].message
    connect().delete_experiment("1")
    deleted = found()[NAMED]
    assert deleted.level == "error" and deleted.advice.endswith("mlflow experiments restore -x 1")
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute(
            "UPDATE experiments SET artifact_location = 'file:///proc/1/mlruns' WHERE name = 'dgpo'"
        )
    assert found()[PLACES].level in ("error", "warning")  # root may write anywhere, if not there
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE alembic_version SET version_num = 'c1d2e3f4a5b6'")
    (older,) = found().values()
    assert older.level == "error" and "mlflow db upgrade" in older.advice
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("DELETE FROM experiments")
    (half,) = found().values()
    assert half.level == "error" and half.advice.startswith(f"rm {database}")


@pytest.mark.parametrize(
    ("status", "body", "level", "said"),
    [
        (200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "active"}}, "ok", "active"),
        (200, {"experiment": {"experiment_id": "7", "lifecycle_stage": "deleted"}}, "error", "restore -x 7"),
        (404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}, "ok", "made by the first run"),
        (403, {}, "error", "MLFLOW_TRACKING_PASSWORD"),
        (404, "a page", "error", "is the address of an MLflow server"),
    ],
)
def test_a_servers_experiment(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, status: int, body: object, level: str, said: str
) -> None:
    with server(status, body) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//me:" + "secret@"))
        (only,) = found().values()
    assert (only.subject, only.level) == (NAMED, level)
    assert said in only.message + only.advice
    assert "secret" not in json.dumps(only.__dict__)


def test_a_server_that_is_silent_is_told_of_by_the_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert found() == {}
