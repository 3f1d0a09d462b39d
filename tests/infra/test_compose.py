"""infra/compose.yaml and infra/Dockerfile without an engine: our rules."""

import http.server
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dgpo_core.config.retrieval import parse_location
from infra.secrets import GENERATED
from tasks.commands.cli import app
from tests.conftest import ROOT
from tests.infra.composition import COMPOSE, VARIABLE, load, secrets

OURS = "dgpo:"
RUNTIME = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

raw = load()
SERVICES: dict[str, Any] = raw["services"]


@pytest.fixture
def resolved(tmp_path: Path) -> dict[str, Any]:
    services: dict[str, Any] = load(secrets(tmp_path))["services"]
    return services


def test_an_engine_accepts_it(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no `docker compose` here")
    secrets(tmp_path)
    command = [docker, "compose", "--env-file", str(tmp_path / ".env"), "-f", str(COMPOSE), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_limited_and_restarted(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert service["restart"] == "unless-stopped"
    assert "memory" in service["deploy"]["resources"]["limits"]
    assert service["logging"]["options"]["max-size"]
    if name != "postgres":  # its image begins as root and steps down
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]


@pytest.mark.parametrize("name", SERVICES)
def test_images_have_an_exact_version(name: str) -> None:
    _, _, tag = SERVICES[name]["image"].partition(":")
    assert re.match(r"v?\d+\.\d+", tag), tag
    if SERVICES[name]["image"].startswith(OURS):
        assert tag.removesuffix("-gpu") == RUNTIME["version"]


def test_ports_are_on_loopback_unless_asked(resolved: dict[str, Any], tmp_path: Path) -> None:
    published = {name: port for name, service in resolved.items() for port in service.get("ports", [])}
    assert set(published) == {"prefect", "mlflow", "qdrant", "agent", "retriever"}
    assert all(port.startswith("127.0.0.1:") for port in published.values())
    opened = load({**secrets(tmp_path), "DGPO_BIND": "0.0.0.0"})["services"]
    assert opened["prefect"]["ports"] == ["0.0.0.0:4200:4200"]
    # they ask for no password: opening the others must not open them
    assert opened["agent"]["ports"] == ["127.0.0.1:8080:8080"]
    assert opened["retriever"]["ports"] == ["127.0.0.1:8000:8000"]


def test_every_variable_is_generated_or_has_a_default() -> None:
    text = COMPOSE.read_text()
    found = list(VARIABLE.finditer(text))
    assert {match["name"] for match in found if match["kind"] != "-"} <= set(GENERATED)
    assert set(GENERATED) <= {match["name"] for match in found}
    assert text.count("${") == len(found)  # no other form is used


def test_without_secrets_nothing_starts() -> None:
    with pytest.raises(KeyError, match=r"run python3 -m infra\.secrets"):
        load({})


def test_no_secret_is_written_down_or_on_a_command_line(tmp_path: Path) -> None:
    secret = re.compile(r"PASSWORD|API_KEY|AUTH_STRING|SECRET_KEY")
    values = secrets(tmp_path)
    for service, resolved in zip(SERVICES.values(), load(values)["services"].values(), strict=True):
        for name, value in service.get("environment", {}).items():
            if secret.search(name):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?run python3 -m infra.secrets\}", value), name
        commands = json.dumps([resolved.get("command"), resolved["healthcheck"]])
        assert not any(value in commands for name, value in values.items() if not name.startswith("DGPO_"))


def test_a_service_gets_only_the_secrets_that_it_uses(resolved: dict[str, Any], tmp_path: Path) -> None:
    clients = {"agent", "worker-cpu", "worker-gpu"}
    owners = {
        "POSTGRES_PASSWORD": {"postgres"},
        "PREFECT_DB_PASSWORD": {"postgres", "prefect"},
        "MLFLOW_DB_PASSWORD": {"postgres", "mlflow"},
        "MLFLOW_SESSION_KEY": {"mlflow"},
        "PREFECT_AUTH_STRING": {"prefect", *clients},
        "MLFLOW_ADMIN_PASSWORD": {"mlflow", *clients},
        "QDRANT_API_KEY": {"qdrant", "retriever", *clients},
    }
    values = secrets(tmp_path)
    environments = {service: json.dumps(it.get("environment")) for service, it in resolved.items()}
    for name, expected in owners.items():
        assert {service for service, text in environments.items() if values[name] in text} == expected, name


def test_names_are_declared_and_used() -> None:
    volumes, networks = set(), set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if re.fullmatch(r"[a-z]+", source):
                volumes.add(source)
            elif not source.startswith("$"):
                assert (COMPOSE.parent / source).exists(), source
        networks |= set(service.get("networks", ["default"]))
        for needed, how in service.get("depends_on", {}).items():
            assert needed in SERVICES
            assert how == {"condition": "service_healthy"}
            assert not SERVICES[needed].get("profiles"), "it would not be started"
    assert volumes == set(raw["volumes"])
    assert networks == set(raw["networks"])


def test_only_the_servers_reach_postgres() -> None:
    reaching = {name for name, it in SERVICES.items() if "databases" in it.get("networks", [])}
    assert reaching == {"postgres", "prefect", "mlflow"} and raw["networks"]["databases"]["internal"]
    assert SERVICES["postgres"]["networks"] == ["databases"] and "ports" not in SERVICES["postgres"]


@pytest.mark.parametrize("name", [name for name, it in SERVICES.items() if it["image"].startswith(OURS)])
def test_commands_exist_and_take_their_options(name: str) -> None:
    command = SERVICES[name]["command"]
    match command:
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["dgpo", subcommand, *arguments]:
            group: Any = typer.main.get_command(app)
            given = group.commands[subcommand].make_context(subcommand, [*arguments]).params
            assert f":{given['port']}/health" in SERVICES[name]["healthcheck"]["test"][-1]
            assert SERVICES[name]["ports"][0].endswith(f":{given['port']}")
            if "location" in given:
                assert parse_location(given["location"]) == ("server", "http://qdrant:6333")
        case [program, *_]:
            scripts = {s.name for s in importlib.metadata.entry_points(group="console_scripts")}
            assert program in scripts
    for argument in command:
        if argument.startswith("/app/infra/"):
            assert (ROOT / argument.removeprefix("/app/")).is_file(), argument


def test_the_worker_takes_the_options_that_it_gets() -> None:
    help_page = [sys.executable, "-m", "prefect", "worker", "start", "--help"]
    shown = subprocess.check_output(help_page, text=True, env={**os.environ, "COLUMNS": "300"})
    for name in ("worker-cpu", "worker-gpu"):
        options = [argument for argument in SERVICES[name]["command"] if argument.startswith("--")]
        assert options and all(option in shown for option in options)


def test_qdrant_of_the_image_fits_the_client() -> None:
    version = re.search(r"qdrant/qdrant:v(\d+\.\d+)", SERVICES["qdrant"]["image"])
    constraints = (ROOT / "constraints/main.txt").read_text()
    assert version and f"qdrant-client=={version[1]}." in constraints


def test_qdrants_health_check_tells_ready_from_not(resolved: dict[str, Any]) -> None:
    """Its image has no client for HTTP: the check is bash alone."""

    class Ready(http.server.BaseHTTPRequestHandler):
        code = 200

        def do_GET(self) -> None:
            self.send_response(self.code if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Ready)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = resolved["qdrant"]["healthcheck"]["test"][1:]
    check = [part.replace("/6333", f"/{server.server_port}") for part in command]
    assert subprocess.run(check, timeout=10).returncode == 0
    Ready.code = 503
    assert subprocess.run(check, timeout=10).returncode != 0
    server.shutdown()
    server.server_close()
    assert subprocess.run(check, timeout=10, stderr=subprocess.DEVNULL).returncode != 0


class TestDockerfile:
    lines = (ROOT / "infra/Dockerfile").read_text().replace("\\\n", " ").splitlines()

    def test_what_it_copies_is_sent_to_the_builder(self) -> None:
        rules = re.findall(r"^[^#\s].*", (ROOT / ".dockerignore").read_text(), re.M)
        assert rules[0] == "*"
        copies = [line.split()[1:-1] for line in self.lines if re.match("COPY (?!--from)", line)]
        copied = {source for sources in copies for source in sources}
        assert copied == {rule[1:] for rule in rules if rule.startswith("!")}
        assert all((ROOT / source).exists() for source in copied)
        assert rules.index("infra/.env") > rules.index("!infra")  # the last rule that fits counts

    def test_the_base_is_exact_and_the_user_is_not_root(self) -> None:
        (python,) = [line.split("=", 1)[1] for line in self.lines if line.startswith("ARG PYTHON=")]
        assert re.match(r"3\.\d+\.\d+-slim-", python)
        assert [line for line in self.lines if line.startswith("USER ")][-1] == "USER dgpo"

    def test_its_extras_exist(self) -> None:
        extras = re.findall(r"extras=([a-z,]+)", "\n".join(self.lines))
        assert len(extras) == 2  # without and with a GPU
        assert set(",".join(extras).split(",")) <= set(RUNTIME["optional-dependencies"])
