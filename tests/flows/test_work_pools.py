"""The templates against Prefect: as JSON schemas, on a real server, and as a worker resolves them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from dgpo_core.errors import UserError
from flows.deploy import FOLDER, Kind, job_template
from tests.conftest import ROOT
from tests.infra.test_services import free_port

PLACEHOLDER = re.compile(r"\{\{\s*([^}]+?)\s*\}\}")
SECRET = re.compile(r"PASSWORD|API_KEY|AUTH_STRING|TOKEN")


def leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("kind", Kind)
def test_what_a_job_uses_is_declared_and_the_defaults_are_valid(kind: Kind) -> None:
    loaded = job_template(kind)
    variables = loaded["variables"]
    Draft202012Validator.check_schema(variables)
    used = {name for text in leaves(loaded["job_configuration"]) for name in PLACEHOLDER.findall(text)}
    assert used == set(variables["properties"])
    defaults = {
        name: schema["default"]
        for name, schema in variables["properties"].items()
        if schema.get("default") is not None
    }
    Draft202012Validator(variables).validate(defaults)


@pytest.mark.parametrize("kind", Kind)
def test_secrets_are_named_and_never_written_down(kind: Kind) -> None:
    environment = job_template(kind)["variables"]["properties"]["env"]["default"]
    for name, value in environment.items():
        if SECRET.search(name):
            assert value.startswith("{{ prefect.blocks.secret."), name


def test_gpus() -> None:
    docker = job_template(Kind.DOCKER, 2)["variables"]["properties"]["device_requests"]["default"]
    assert docker == [{"count": 2, "capabilities": [["gpu"]]}]
    assert job_template(Kind.KUBERNETES, 4)["variables"]["properties"]["gpus"]["default"] == 4
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        job_template(Kind.PROCESS, 1)


def test_the_image_is_that_of_the_compose_file() -> None:
    compose = (ROOT / "infra/compose.yaml").read_text()
    for kind in (Kind.DOCKER, Kind.KUBERNETES):
        image = job_template(kind)["variables"]["properties"]["image"]["default"]
        assert f"image: {image}\n" in compose


def test_the_command_prints_the_template() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.deploy", "--template", "--pool-type", "docker", "--gpus", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == job_template(Kind.DOCKER, 1)


# In a process of its own: Prefect keeps the settings with which it was first imported.
WORKER = """
import asyncio, json
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessWorker
from pydantic import ConfigDict
from flows.deploy import Kind, job_template

class Anything(BaseJobConfiguration):
    model_config = ConfigDict(extra="allow")

async def resolve():
    for name in ("mlflow-password", "qdrant-api-key"):
        await Secret(value=f"the {name}").save(name)
    found = {"default": ProcessWorker.get_default_base_job_template()}
    async with get_client() as api:
        for kind in Kind:
            made = job_template(kind, 0 if kind is Kind.PROCESS else 1)
            await api.create_work_pool(WorkPoolCreate(name=kind, type=kind, base_job_template=made))
            stored = (await api.read_work_pool(kind)).base_job_template
            job = await Anything.from_template_and_values(stored, {"env": {"EXTRA": "1"}}, client=api)
            found[kind] = job.model_dump(mode="json")
    print(json.dumps(found))

asyncio.run(resolve())
"""


@pytest.mark.slow
class TestServer:
    """A real server takes the pools, and a worker's resolution fills them."""

    @pytest.fixture(scope="class")
    def resolved(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
        """Each pool's job configuration with everything filled in, as its worker gets it."""
        from flows.server import local_server

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
            patch.setenv("PYTHONPATH", str(ROOT))
            with local_server(free_port()) as url:
                patch.setenv("PREFECT_API_URL", url)
                command = [sys.executable, "-c", WORKER]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
                assert done.returncode == 0, done.stderr
                yield json.loads(done.stdout)

    def test_the_process_template_is_prefects_own_but_for_the_environment(
        self, resolved: dict[str, Any]
    ) -> None:
        theirs, ours = resolved["default"], job_template(Kind.PROCESS)
        for loaded in (theirs, ours):
            loaded["variables"].pop("description", None)
            del loaded["variables"]["properties"]["env"]
        assert ours == theirs

    def test_a_container_gets_the_secrets_and_what_a_run_adds(self, resolved: dict[str, Any]) -> None:
        environment = resolved["docker"]["env"]
        assert environment["MLFLOW_TRACKING_PASSWORD"] == "the mlflow-password"
        assert environment["EXTRA"] == "1"
        assert environment["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
        assert resolved["docker"]["container_create_kwargs"]["device_requests"][0]["count"] == 1

    def test_a_pod_gets_gpus_cache_and_secret(self, resolved: dict[str, Any]) -> None:
        pod = resolved["kubernetes"]["job_manifest"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["envFrom"] == [{"secretRef": {"name": "dgpo"}}]
        claimed = [
            v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v
        ]
        assert claimed == ["dgpo-dvc-cache"]

    def test_a_process_keeps_the_workers_environment(self, resolved: dict[str, Any]) -> None:
        assert resolved["process"]["env"]["EXTRA"] == "1"
        assert "MLFLOW_TRACKING_URI" not in resolved["process"]["env"]


def test_containers_find_a_cache_of_their_own(tmp_path: Path, dvc_repository: Path) -> None:
    """DVC_GLOBAL_CONFIG_DIR of the templates: infra/dvc/config names a cache on the volume."""
    environment = job_template(Kind.DOCKER)["variables"]["properties"]["env"]["default"]
    assert environment["DVC_GLOBAL_CONFIG_DIR"] == "/app/infra/dvc"  # where the image has it
    assert (FOLDER.parent / "dvc" / "config").is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_GLOBAL_CONFIG_DIR", str(FOLDER.parent / "dvc"))
        out = subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir"], cwd=dvc_repository, capture_output=True, text=True
        )
    assert out.stdout.strip() == "/cache/dvc"
