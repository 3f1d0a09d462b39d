"""`dgpo deploy` and `dgpo worker` on a Prefect server that others use too, and the pools' templates."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from dgpo_core.errors import UserError
from flows.work_pools import FOLDER, Kind, job_template
from tests.conftest import ROOT, free_port
from tests.flows.conftest import prefect_server

RESTARTED = {"pipeline/on-demand", "pipeline/nightly", "pipeline/single-stage", "reproduce/paper"}
OURS = RESTARTED | {"stage/internal-cpu", "stage/internal-gpu"}


def program(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("module", ["flows.deploy", "flows.worker"])
def test_without_a_server_there_is_one_line(module: str) -> None:
    port = free_port()
    done = program(module, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
    assert done.returncode == 2
    assert done.stderr == f"error: no Prefect server at http://127.0.0.1:{port}/api: dgpo up\n"
    done = program(module, PREFECT_API_URL=f"http://127.0.0.1:{port}")
    assert "an API's address ends with /api" in done.stderr


def test_which_server_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable, a port, `dgpo up`, in this order; `adopt` puts `dgpo up`'s address into the variable."""
    from flows.server import named_server
    from tasks.project import servers as services

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert named_server() is None
    assert named_server(4277) == "http://127.0.0.1:4277/api"
    up = services.ServiceRecord("prefect", "", [], "PREFECT_API_URL", "http://127.0.0.1:4288/api", "", "")
    services.FOLDER.mkdir()
    services.write(up)
    assert named_server() is None  # it has crashed
    monkeypatch.setattr(services, "leader", lambda record: record)
    for _ in ("before adopt", "after"):
        assert named_server() == up.address
        assert named_server(4277) == "http://127.0.0.1:4277/api"
        services.adopt()
    monkeypatch.setenv("PREFECT_API_URL", "https://team/api")
    assert named_server() == named_server(4277) == "https://team/api"


@pytest.mark.thorough
class TestSharedServer:
    """In this order: what others have under our names, an earlier version's objects, then ours, twice."""

    @pytest.fixture(scope="class")
    def client(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
        """Start a server that no other test has used."""
        with prefect_server(tmp_path_factory.mktemp("prefect")) as url:
            from prefect import get_client
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
                yield client

    def test_a_pool_of_somebody_else_is_named_and_left(self, client: Any) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate

        theirs = WorkPoolCreate(name="cpu-pool", type="docker", description="of the data team")
        client.create_work_pool(theirs)
        done = program("flows.deploy")
        assert done.returncode == 2
        assert "the work pool cpu-pool of this server is not ours" in done.stderr
        assert client.read_work_pool("cpu-pool").description == "of the data team"
        client.delete_work_pool("cpu-pool")

    def test_a_deployment_of_somebody_else_is_named_and_left(self, client: Any) -> None:
        from prefect import flow

        @flow(name="pipeline")
        def other() -> None: ...

        flow_id = client.create_flow(other)
        theirs = client.create_deployment(flow_id, name="nightly", entrypoint="etl.py:main", tags=["etl"])
        done = program("flows.deploy")
        assert done.returncode == 2
        assert (
            "the deployment pipeline/nightly of this server is not ours (it runs etl.py:main" in done.stderr
        )
        assert client.read_deployment(theirs).entrypoint == "etl.py:main"
        assert client.read_work_pools() == []  # nothing was changed before that was found
        client.delete_deployment(theirs)

    def test_what_an_earlier_version_has_left_is_replaced(self, client: Any) -> None:
        from prefect.automations import Automation
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.client.schemas.objects import StateType
        from prefect.events import EventTrigger, Posture
        from prefect.events.actions import ChangeFlowRunState

        everybodys = EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=100),
        )
        old = Automation(
            name="dgpo: a run that has fallen silent has crashed",
            trigger=everybodys,
            actions=[ChangeFlowRunState(state=StateType.CRASHED)],
        )
        old.create()
        mine = old.model_copy(update={"name": "mine", "id": None})
        mine.create()
        # as a worker of infra/compose.yaml makes it that comes before the deployment
        client.create_work_pool(
            WorkPoolCreate(name="cpu-pool", type="process", base_job_template=job_template(Kind.PROCESS))
        )
        client.upsert_global_concurrency_limit_by_name("gpu", 7)
        flow_id = client.create_flow_from_name("stage")
        client.create_deployment(flow_id, name="cpu", tags=["dgpo", "stage"])

        done = program("flows.deploy", "--gpus", "2")
        assert done.returncode == 0, done.stderr
        assert "nightly run (pipeline/nightly): off; `dgpo deploy --nightly` switches it on" in done.stdout
        found = {automation.name: automation for automation in client.read_automations()}
        ids = {name: f"prefect.deployment.{client.read_deployment_by_name(name).id}" for name in OURS}
        assert {each.name for each in client.read_deployments()} == {name.split("/")[1] for name in OURS}
        assert found["mine"].trigger.match_related.root == {}
        again, silent = found["dgpo: a crashed run starts again"], found[old.name]
        assert len(found) == 3 and silent.id == old.id
        assert set(silent.trigger.match_related.root["prefect.resource.id"]) == set(ids.values())
        restarted = {ids[name] for name in RESTARTED}
        assert set(again.trigger.match_related.root["prefect.resource.id"]) == restarted
        assert client.read_global_concurrency_limit_by_name("gpu").limit == 7
        assert client.read_global_concurrency_limit_by_name("dgpo-gpu").limit == 2

    def test_the_form_refuses_what_there_is_not(self, client: Any) -> None:
        from prefect.exceptions import PrefectHTTPStatusError

        deployment = client.read_deployment_by_name("pipeline/on-demand").id
        right = {"profile": "tiny", "from_stage": "distill@taid", "beta": 0.01}
        run = client.create_flow_run_from_deployment(deployment, parameters={"settings": right})
        client.delete_flow_run(run.id)
        for wrong in ({"profile": "huge"}, {"targets": ["distil@kd"]}, {"beta": "much"}):
            with pytest.raises(PrefectHTTPStatusError, match="Validation failed for field"):
                client.create_flow_run_from_deployment(deployment, parameters={"settings": wrong})

    def test_the_second_time_keeps_what_people_have_switched(self, client: Any) -> None:
        from prefect.automations import Automation

        before = {name: client.read_deployment_by_name(name).id for name in OURS}
        (schedule,) = client.read_deployment_by_name("pipeline/nightly").schedules
        assert not schedule.active
        off = Automation.read(name="dgpo: a crashed run starts again")
        assert isinstance(off, Automation)
        off.disable()
        for arguments, active in ((["--nightly"], True), ([], True), (["--no-nightly"], False), ([], False)):
            assert program("flows.deploy", *arguments).returncode == 0
            (schedule,) = client.read_deployment_by_name("pipeline/nightly").schedules
            assert schedule.active is active
        assert {name: client.read_deployment_by_name(name).id for name in OURS} == before
        enabled = {automation.name: automation.enabled for automation in client.read_automations()}
        assert len(enabled) == 3 and not enabled["dgpo: a crashed run starts again"]

    def test_a_worker_without_its_pool_says_what_to_do(self, client: Any) -> None:
        client.delete_work_pool("gpu-pool")
        done = program("flows.worker", "gpu")
        assert done.returncode == 2 and done.stderr.endswith(
            "has no work pool gpu-pool: run `dgpo deploy` first\n"
        )


def test_runs_of_any_worker_say_often_enough_that_they_live() -> None:
    """Prefect's own interval is longer than the silence after which a run is called crashed."""
    from flows.deploy import PREFECT_YAML, SILENCE

    for entry in yaml.safe_load(PREFECT_YAML.read_text())["deployments"]:
        variables = entry["work_pool"]["job_variables"]["env"]
        frequency = int(variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * frequency < SILENCE.total_seconds(), entry["name"]


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
    defaults = {name: schema.get("default") for name, schema in variables["properties"].items()}
    given = {name: default for name, default in defaults.items() if default is not None}
    Draft202012Validator(variables).validate(given)


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
    done = program("flows.deploy", "--template", "--pool-type", "docker", "--gpus", "1")
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
from flows.work_pools import Kind, job_template

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
        """Fill in each pool's job configuration as its worker does."""
        with prefect_server(tmp_path_factory.mktemp("prefect")):
            command, environment = [sys.executable, "-c", WORKER], {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
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
        claims = [volume.get("persistentVolumeClaim") for volume in pod["volumes"]]
        assert [claim["claimName"] for claim in claims if claim] == ["dgpo-dvc-cache"]

    def test_a_process_keeps_the_workers_environment(self, resolved: dict[str, Any]) -> None:
        assert resolved["process"]["env"]["EXTRA"] == "1"
        assert "MLFLOW_TRACKING_URI" not in resolved["process"]["env"]


def test_containers_find_a_cache_of_their_own(dvc_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC_GLOBAL_CONFIG_DIR of the templates: infra/dvc/config names a cache on the volume."""
    environment = job_template(Kind.DOCKER)["variables"]["properties"]["env"]["default"]
    assert environment["DVC_GLOBAL_CONFIG_DIR"] == "/app/infra/dvc"  # where the image has it
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(FOLDER.parent / "dvc"))
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    assert subprocess.check_output(command, cwd=dvc_repository, text=True).strip() == "/cache/dvc"
