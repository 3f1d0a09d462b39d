"""The servers of infra/compose.yaml with its commands and settings but without containers, on a real Postgres
that its init script has prepared."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from dgpo_core.config.params import Params, resolve_profile
from tasks.commands.doctor import store
from tasks.project.groups import end_group
from tests.conftest import ROOT, free_port
from tests.infra.composition import load, secrets

PROGRAMS = Path(shutil.which("pg_ctl") or "/usr/lib/postgresql/15/bin/pg_ctl").parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PROGRAMS / "initdb").exists(), reason="Postgres is not installed"),
    pytest.mark.skipif(os.name != "posix", reason="needs POSIX users"),
]


@dataclass
class Place:
    folder: Path
    port: int  # of Postgres
    secrets: dict[str, str]
    services: dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Start Postgres as its image does: local connections are trusted while the init script runs."""
    folder = tmp_path_factory.mktemp("postgres")
    as_user: list[str] = []
    if os.getuid() == 0:  # Postgres does not run as root
        folder = Path("/tmp") / f"postgres-{folder.parent.name}-{os.getpid()}"
        folder.mkdir()
        shutil.chown(folder, "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    port, values = free_port(), secrets(folder)
    data, options = folder / "data", f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"

    def run(program: str, *arguments: Any) -> None:
        command = [*as_user, str(PROGRAMS / program), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)

    run("initdb", "-D", data, "-U", "postgres", "--auth-local=trust", "--auth-host=scram-sha-256")
    run("pg_ctl", "-D", data, "-o", options, "-w", "-l", folder / "log", "start")
    try:
        services = load(values)["services"]
        local = {"PGHOST": str(folder), "PGPORT": str(port)}
        script = ROOT / "infra/postgres/init.sh"
        environment = {**os.environ, **local, **services["postgres"]["environment"]}
        subprocess.run(["bash", script], env=environment, check=True, timeout=60)
        yield Place(folder, port, values, services)
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


OWNS = "create table t(x int); drop table t; select current_user"


def psql(
    place: Place, user: str, password: str, database: str, query: str = OWNS
) -> subprocess.CompletedProcess[str]:
    where = ["-h", "127.0.0.1", "-p", str(place.port), "-U", user, "-d", database]
    return subprocess.run(
        ["psql", *where, "-tAc", query],
        env={**os.environ, "PGPASSWORD": password},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_each_server_has_a_database_that_the_other_cannot_open(place: Place) -> None:
    for user, other in (("prefect", "mlflow"), ("mlflow", "prefect")):
        password = place.secrets[f"{user.upper()}_DB_PASSWORD"]
        assert psql(place, user, password, user).stdout.split()[-1] == user
        assert "permission denied" in psql(place, user, password, other).stderr
        assert "authentication failed" in psql(place, user, "guessed", user).stderr


def serve(place: Place, name: str, port: int, **settings: str) -> Iterator[str]:
    """Start a service with its command and environment at another address; give its URL when it answers."""
    service = place.services[name]
    command = [sys.executable, *service["command"][1:]]
    number = {"prefect": "4200", "mlflow": "5000"}[name]
    command = [part.replace(number, str(port)).replace("0.0.0.0", "127.0.0.1") for part in command]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PREFECT_"))},
        **service["environment"],
        "PGPORT": str(place.port),
        "PREFECT_HOME": str(place.folder / "home"),
        **settings,
    }
    (check,) = [part for part in service["healthcheck"]["test"] if "urlopen" in part]
    health = [sys.executable, "-c", check.replace(number, str(port))]
    with (place.folder / f"{name}.log").open("w") as log:
        where: dict[str, Any] = {"cwd": place.folder, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, env=environment, **where, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while subprocess.run(health, capture_output=True).returncode:
            said = (place.folder / f"{name}.log").read_text()[-2000:]
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        end_group(process)


def status(url: str, credentials: str | None = None, host: str | None = None) -> int:
    auth = httpx.BasicAuth(*credentials.split(":")) if credentials else None
    return httpx.get(url, auth=auth, headers={"Host": host} if host else {}, timeout=20).status_code


class TestPrefect:
    @pytest.fixture(scope="class")
    def url(self, place: Place) -> Iterator[str]:
        port = str(place.port)
        overrides = {"PREFECT_SERVER_DATABASE_HOST": "127.0.0.1", "PREFECT_SERVER_DATABASE_PORT": port}
        yield from serve(place, "prefect", free_port(), **overrides)

    def test_it_wants_the_password(self, place: Place, url: str) -> None:
        assert status(f"{url}/api/admin/version") == 401
        assert status(f"{url}/api/admin/version", "admin:guessed") == 401
        assert status(f"{url}/api/admin/version", place.secrets["PREFECT_AUTH_STRING"]) == 200

    def test_its_data_is_in_postgres(self, place: Place, url: str) -> None:
        password = place.secrets["PREFECT_DB_PASSWORD"]
        done = psql(place, "prefect", password, "prefect", "select count(*) from work_pool")
        assert done.stdout.strip().isdigit()


class TestMlflow:
    @pytest.fixture(scope="class")
    def url(self, place: Place) -> Iterator[str]:
        pytest.importorskip("flask_wtf", reason="the extra `server` is not installed")
        pytest.importorskip("psycopg2", reason="the extra `server` is not installed")
        ini = (ROOT / "infra/mlflow-auth.ini").read_text().replace("@postgres/", "@127.0.0.1/")
        (place.folder / "auth.ini").write_text(ini)
        store = place.services["mlflow"]["environment"]["MLFLOW_BACKEND_STORE_URI"]
        overrides = {
            "MLFLOW_AUTH_CONFIG_PATH": str(place.folder / "auth.ini"),
            "MLFLOW_BACKEND_STORE_URI": store.replace("@postgres/", "@127.0.0.1/"),
        }
        yield from serve(place, "mlflow", free_port(), **overrides)

    def test_it_wants_the_password_by_the_name_that_workers_use(self, place: Place, url: str) -> None:
        search = f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
        admin = f"admin:{place.secrets['MLFLOW_ADMIN_PASSWORD']}"
        assert status(search) == 401
        assert status(search, "admin:guessed") == 401
        assert status(search, admin) == 200
        assert status(search, admin, host=url.replace("http://127.0.0.1", "mlflow")) == 200
        assert status(search, admin, host="evil.example") == 403

    def test_the_doctor_finds_it_healthy(
        self, place: Place, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For who has the password; who has none is told which variables are missing."""
        monkeypatch.delenv("PREFECT_API_URL", raising=False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.delenv(name, raising=False)
        tiny = Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml"))
        (refused,) = store(tiny)
        assert refused.level == "error" and "MLFLOW_TRACKING_PASSWORD" in refused.advice
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", place.secrets["MLFLOW_ADMIN_PASSWORD"])
        assert [(f.subject, f.level) for f in store(tiny)] == [("MLflow", "ok")]

    def test_no_secret_is_on_its_command_line_or_in_its_log(self, place: Place, url: str) -> None:
        command = " ".join(place.services["mlflow"]["command"] + place.services["prefect"]["command"])
        log = (place.folder / "mlflow.log").read_text()
        for name, secret in place.secrets.items():
            if not name.startswith("DGPO_"):
                assert secret not in command and secret not in log, name
