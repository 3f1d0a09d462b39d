"""Make a Prefect server ready for the pipeline's runs: `dgpo deploy`.

Creates work pools, the limit on GPUs, the deployments of prefect.yaml, automations that start crashed runs
again, and alerts. It can be run as often as one likes, from any checkout: what is there is brought to what
this version wants. Others may use the server too: what is not ours stays as it is, and is named where it has
one of our names.
"""

import json
import os
import pydoc
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from dgpo_core.config.params import read_yaml
from dgpo_core.errors import UserError
from flows.alerts import alerts, notification_blocks, runs_of
from flows.execution import GPU_LIMIT
from flows.server import API_URL, answers_of, running_server
from flows.settings import choices, with_choices
from flows.work_pools import TAG, Kind, job_template
from tasks.commands.cli import run_as
from tasks.project.graph import POOLS

PREFECT_YAML = Path(__file__).resolve().parents[1] / "prefect.yaml"
DESCRIPTION = f"{TAG}: runs of the pipeline's deployments"
NIGHTLY = "pipeline/nightly"
EARLIER = ("stage/cpu", "stage/gpu")  # names that deployments of ours had in version 0.1
NIGHTLY_WORDS = {
    True: "on; `dgpo deploy --no-nightly` switches it off",
    False: "off; `dgpo deploy --nightly` switches it on",
}
# A run says every 30 s that it lives (PREFECT_FLOWS_HEARTBEAT_FREQUENCY in prefect.yaml).
SILENCE = timedelta(seconds=100)
PATIENCE = timedelta(seconds=20)  # after a crash
STARTED = ("Scheduled", "AwaitingRetry", "Pending", "Running", "Cancelled")
ENDED = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry")
RESTARTED = ("pipeline", "reproduce")  # flows; a stage on another worker is started again by its pipeline


def automations(deployments: Mapping[str, UUID]) -> list[Automation]:
    """Say what the server does about runs of these `deployments` whose machine, worker or process died.

    Deployments are told by id: other people's flows, tags and deployments may be called as ours are.
    """
    silent = _trigger("heartbeat", ("heartbeat", *ENDED), deployments.values(), SILENCE)
    # Not at once: a worker tells of a crash twice, and the second time must not hit the new attempt.
    crashed = _trigger("Crashed", STARTED, _restarted(deployments), PATIENCE)
    to_crashed = ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its worker is gone")
    again = ChangeFlowRunState(
        state=StateType.SCHEDULED, name="AwaitingRetry", message="started again after a crash"
    )
    return [
        Automation(
            name="dgpo: a run that has fallen silent has crashed",
            description=f"No heartbeat for {SILENCE.total_seconds():.0f} s: its worker or machine is gone",
            tags=[TAG],
            trigger=silent,
            actions=[to_crashed],
        ),
        Automation(
            name="dgpo: a crashed run starts again",
            description="It continues where it was, in its worktree, when a worker of its pool is there",
            tags=[TAG],
            trigger=crashed,
            actions=[again],
        ),
    ]


def _restarted(deployments: Mapping[str, UUID]) -> list[UUID]:
    """Return those whose runs people start."""
    return [id_ for name, id_ in deployments.items() if name.split("/")[0] in RESTARTED]


def _trigger(
    after: str, unless: Iterable[str], deployments: Iterable[UUID], within: timedelta
) -> EventTrigger:
    """Fire where a run of these deployments had the event `after`, and none of `unless` followed in time."""
    return EventTrigger(
        after={f"prefect.flow-run.{after}"},
        expect={f"prefect.flow-run.{event}" for event in unless},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related=runs_of(deployments),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )


def deploy(
    gpus: int = 1, kind: Kind = Kind.PROCESS, nightly: bool | None = None, told: Sequence[str] = ()
) -> None:
    """Create or update everything; a run of the GPU pool gets all `gpus`, where the pool can give any.

    `nightly` switches the nightly run on or off; None leaves it as it is, and off where it is new. Alerts go
    to the blocks `told`, or where they go already. Raises UserError when `prefect deploy` refuses, and,
    before anything is changed, for a block that is not there or what is not ours but has one of our names.
    """
    entries = {_full_name(entry): entry for entry in read_yaml(PREFECT_YAML)["deployments"]}
    with get_client(sync_client=True) as client:
        before = {name: _deployment(client, name) for name in entries}
        for name, found in before.items():
            if found and not _is_ours(found, entries[name]):
                raise UserError(
                    f"the deployment {name} of this server is not ours (it runs {found.entrypoint}, has no "
                    f"tag {TAG}): rename that one, or use a Prefect server of your own (dgpo up)"
                )
        blocks = notification_blocks(client, told)
        left = [found for name in EARLIER if (found := _deployment(client, name)) and TAG in found.tags]
        used = {found.work_pool_name for found in (*before.values(), *left) if found}
        pools = [_pool(client, f"{name}-pool", kind, gpus if name == "gpu" else 0, used) for name in POOLS]
        for pool in pools:
            _write_pool(client, pool)
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpus)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", str(PREFECT_YAML)]
    done = subprocess.run(command, cwd=PREFECT_YAML.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"prefect deploy: {' '.join((done.stderr or done.stdout).split())}")
    with get_client(sync_client=True) as client:
        after = {name: client.read_deployment_by_name(name) for name in entries}
        ids = {name: found.id for name, found in after.items()}
        for found in left:
            client.delete_deployment(found.id)
        there = choices(Path())
        for found in after.values():
            form = with_choices(found.parameter_openapi_schema or {}, there)
            client.update_deployment(found.id, DeploymentUpdate(parameter_openapi_schema=form))
        telling = alerts(client, blocks, _restarted(ids))
        for automation in [*automations(ids), *telling]:
            _replace(client, automation)
        if nightly is None:
            nightly = _is_scheduled(before[NIGHTLY])
        for schedule in after[NIGHTLY].schedules:
            client.update_deployment_schedule(after[NIGHTLY].id, schedule.id, active=nightly)
    print(f"work pools: {', '.join(pool.name for pool in pools)}; limit {GPU_LIMIT}: {gpus}")
    print(f"deployments of {PREFECT_YAML.name}, 2 automations, {len(telling)} alerts")
    print(f"nightly run ({NIGHTLY}): {NIGHTLY_WORDS[nightly]}")


def _full_name(entry: Mapping[str, Any]) -> str:
    """Return the name on the server of an entry of prefect.yaml: that of its flow, a slash, its own."""
    flow: Any = pydoc.locate(entry["entrypoint"])
    return f"{flow.name}/{entry['name']}"


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def _is_ours(found: DeploymentResponse, entry: Mapping[str, Any]) -> bool:
    """Tell a deployment of ours by its tag, or by what it runs where somebody has removed the tag."""
    return TAG in found.tags or found.entrypoint == entry["entrypoint"]


def _is_scheduled(found: DeploymentResponse | None) -> bool:
    return found is not None and any(schedule.active for schedule in found.schedules)


def _pool(
    client: SyncPrefectClient, name: str, kind: Kind, gpus: int, used: set[str | None]
) -> WorkPoolCreate:
    """Say what the pool shall be. Raise UserError for one of another type, or of somebody else's.

    `used`: pools of the deployments that an earlier version, which described none, has left here.
    """
    job = job_template(kind, gpus if kind is not Kind.PROCESS else 0)
    wanted = WorkPoolCreate(name=name, type=kind, base_job_template=job, description=DESCRIPTION)
    try:
        found: WorkPool = client.read_work_pool(name)
    except ObjectNotFound:
        return wanted
    described = (found.description or "").startswith(TAG)
    # A worker of infra/compose.yaml that comes first makes its pool itself, from our template.
    if not (described or name in used or found.base_job_template == job):
        raise UserError(
            f"the work pool {name} of this server is not ours: use a Prefect server of your own (dgpo up), "
            f"or, if that pool is meant for this project: prefect work-pool update {name} --description {TAG}"
        )
    if found.type != kind:
        raise UserError(f"the work pool {name} has type {found.type}, not {kind}: delete it first")
    return wanted


def _write_pool(client: SyncPrefectClient, pool: WorkPoolCreate) -> None:
    """Create or update a pool; Prefect's `overwrite` would also resume a paused one and lift its limit."""
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        job, description = pool.base_job_template, pool.description
        client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=job, description=description))


def _replace(client: SyncPrefectClient, automation: Automation) -> None:
    """Leave one automation of each name, with our content; off if somebody has switched it off.

    By the name: those of earlier versions, which acted on everybody's runs, have no tag.
    """
    existing = client.read_automations_by_name(automation.name)
    if not existing:
        automation.create()
        return
    automation.id, automation.enabled = existing[0].id, existing[0].enabled
    automation.update()
    for double in existing[1:]:  # of two `dgpo deploy` at once
        client.delete_automation(double.id)


def command(
    gpus: int,
    pool_type: str,
    nightly: bool | None,
    alert: list[str] | None,
    template: bool,
    prefect_port: int | None,
) -> None:
    """Make the Prefect server ready: `dgpo deploy`."""
    kind = Kind(pool_type)
    if template:
        print(json.dumps(job_template(kind, gpus), indent=2))
        return
    url = running_server(prefect_port)
    os.environ[API_URL] = url  # for `prefect deploy`
    with temporary_settings({PREFECT_API_URL: url}), answers_of(url):
        deploy(gpus, kind, nightly, alert or [])


if __name__ == "__main__":
    run_as("deploy", command)
