"""Make a Prefect server ready: `python -m flows.deploy` (PREFECT_API_URL says which server).

Work pools, the limit `gpu`, the deployments of prefect.yaml, and automations that start crashed runs again.
It can be run as often as one likes: what is there is brought to what this version wants.
"""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from prefect import get_client
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events import EventTrigger, Posture
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectNotFound

from dgpo_core.errors import UserError
from flows.dag import POOLS
from flows.execution import GPU_LIMIT
from flows.work_pools import Kind, template
from tasks.stage import main as run_program

PREFECT_YAML = Path(__file__).resolve().parents[1] / "prefect.yaml"
# A run says every 30 s that it lives (PREFECT_FLOWS_HEARTBEAT_FREQUENCY of `make worker`).
SILENCE = timedelta(seconds=100)
PATIENCE = timedelta(seconds=20)  # after a crash
STARTED = ("Scheduled", "AwaitingRetry", "Pending", "Running", "Cancelled")
ENDED = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended", "AwaitingRetry")
RESTARTED = ("pipeline", "reproduce")  # flows; a stage on another worker is started again by its pipeline


def automations() -> list[Automation]:
    """What the server does about runs whose machine, worker or process has died."""
    silent = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in ENDED)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    # Not at once: a worker tells of a crash twice, and the second time must not hit the new attempt.
    crashed = EventTrigger(
        after={"prefect.flow-run.Crashed"},
        expect={f"prefect.flow-run.{state}" for state in STARTED},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={
            "prefect.resource.name": [*RESTARTED],
            "prefect.resource.role": "flow",
        },
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=PATIENCE,
    )
    return [
        Automation(
            name="dgpo: a run that has fallen silent has crashed",
            description=f"No heartbeat for {SILENCE.total_seconds():.0f} s: its worker or machine is gone",
            trigger=silent,
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="no heartbeat: its worker is gone")],
        ),
        Automation(
            name="dgpo: a crashed run starts again",
            description="It continues where it was, in its worktree, when a worker of its pool is there",
            trigger=crashed,
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED, name="AwaitingRetry", message="started again after a crash"
                )
            ],
        ),
    ]


def deploy(gpus: int = 1, kind: Kind = Kind.PROCESS) -> None:
    """Create or update everything; a run of the GPU pool gets all `gpus`, where the pool can give any.

    Raises UserError when the server or `prefect deploy` refuses.
    """
    with get_client(sync_client=True) as client:
        for name in POOLS:
            given = gpus if name == "gpu" and kind is not Kind.PROCESS else 0
            _pool(client, f"{name}-pool", kind, template(kind, given))
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, gpus)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    command += ["--prefect-file", str(PREFECT_YAML)]
    done = subprocess.run(command, cwd=PREFECT_YAML.parent, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"prefect deploy: {' '.join((done.stderr or done.stdout).split())}")
    for automation in automations():
        _replace(automation)
    print(f"work pools: {', '.join(f'{name}-pool' for name in POOLS)}; limit {GPU_LIMIT}: {gpus}")
    print(f"deployments of {PREFECT_YAML.name}, {len(automations())} automations")


def _pool(client: SyncPrefectClient, name: str, kind: Kind, job: dict[str, Any]) -> None:
    try:
        existing = client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=job))
        return
    if existing.type != kind:
        raise UserError(f"the work pool {name} has type {existing.type}, not {kind}: delete it first")
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=job))


def _replace(automation: Automation) -> None:
    """One automation of each name, with our content."""
    try:
        existing = cast(Automation, Automation.read(name=automation.name))
    except ValueError:
        automation.create()
        return
    automation.id = existing.id
    automation.update()


def command(
    gpus: Annotated[int, typer.Option(help="stages' GPUs in use at once, in all", min=0)] = 1,
    pool_type: Annotated[
        Kind, typer.Option(help="what runs are: processes of the worker, containers, pods")
    ] = (Kind.PROCESS),
) -> None:
    """Create work pools, deployments, the GPU limit and automations on the Prefect server."""
    deploy(gpus, pool_type)


if __name__ == "__main__":
    run_program(lambda: typer.run(command))
