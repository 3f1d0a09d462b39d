"""Which stage runs when: one Prefect task for each stage, in the order of DVC's graph."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import Task, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Crashed
from prefect.tasks import exponential_backoff

from dgpo_core.errors import InfrastructureError
from flows.execution import UNCHANGED, StageFailed, execute, publish_summary
from flows.page import RunPage
from flows.remote import is_elsewhere, run_elsewhere
from flows.workspace import Workspace
from tasks.project import graph
from tasks.project.graph import Stage
from tasks.project.groups import Ended


@dataclass(frozen=True)
class StageResult:
    """How a stage ended: Prefect's state name; a message where it failed."""

    stage: str
    state: str
    message: str = ""


@dataclass(frozen=True)
class Schedule:
    """What is to be done: the stages, in order, where, and how."""

    stages: Mapping[str, Stage]
    tree: Path
    page: RunPage
    workspace: Workspace | None = None  # for stages on other workers
    max_parallel: int = 1
    force: bool = False
    retry_delay_seconds: float = 5
    pipeline_run: str | None = None  # in MLflow


def _is_retryable(_task: Task[..., Any], _run: Any, state: State[Any]) -> bool:
    error = state.data
    away = (InfrastructureError, httpx.TransportError)  # a service, or Prefect's own server
    return isinstance(error, away) or (isinstance(error, StageFailed) and error.retryable)


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_is_retryable)
def run_stage(stage: Stage, schedule: Schedule, stale: bool) -> State[None]:
    """Bring one stage up to date; one that is not stale is not even looked at. Raises StageFailed."""
    name = UNCHANGED
    try:
        if stale and is_elsewhere(stage) and schedule.workspace:
            schedule.workspace.save(f"{schedule.tree.name}: before {stage.name}")
            with schedule.page.running(stage.name):
                name = run_elsewhere(
                    stage, schedule.workspace, force=schedule.force, pipeline_run=schedule.pipeline_run
                )
        elif stale:
            log, shown = get_run_logger().info, schedule.page.running(stage.name)
            name = execute(stage, schedule.tree, log, shown, force=schedule.force, pull=False)
    except Ended as end:
        how = Cancelled if end.cancelled or is_cancelled(str(flow_run.id)) else Crashed
        return how(
            message=f"{stage.name}: ended with its run; a stage that keeps progress goes on from there"
        )
    if name != UNCHANGED:
        publish_summary(stage.name, schedule.tree)
    return Completed(name=name, message=f"{stage.name}: {name.lower()}")


def is_cancelled(run: str) -> bool:
    """Tell whether somebody has cancelled the flow run, going by the server; False where it does not say."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        state = client.read_flow_run(UUID(run)).state
        return state is not None and (state.is_cancelling() or state.is_cancelled())
    return False


def run_all(schedule: Schedule) -> list[StageResult]:
    """Run the stages inside a flow, at most `max_parallel` side by side, the most urgent first.

    A stage is stale when DVC said so at the start or a stage that it needs was executed meanwhile; `dvc
    repro` then decides. One whose upstream failed is not run; the others are.
    """
    order = TopologicalSorter(
        {s.name: set(s.upstream) & set(schedule.stages) for s in schedule.stages.values()}
    )
    order.prepare()
    ranks = graph.urgency(schedule.stages)
    futures: dict[str, PrefectFuture[Any]] = {}
    results: dict[str, StageResult] = {}
    ready: list[str] = []
    while order.is_active():
        ready = sorted([*ready, *order.get_ready()], key=ranks.__getitem__, reverse=True)
        running = [name for name in futures if name not in results]
        for name in ready[: schedule.max_parallel - len(running)]:
            ready.remove(name)
            futures[name] = _submit(schedule.stages[name], schedule, futures, results)
            running.append(name)
        finished = next(as_completed([futures[name] for name in running]))
        finished.wait()  # the future is told of its final state a moment later
        name = next(name for name in running if futures[name] is finished)
        results[name] = _result(name, finished)
        schedule.page.ended(name, results[name].state, results[name].message)
        order.done(name)
    return list(results.values())


def is_stale(stage: Stage, results: Mapping[str, StageResult], force: bool) -> bool:
    """Tell whether the stage may have something to do, given how the stages that it needs have ended."""
    touched = {name for name, result in results.items() if result.state != UNCHANGED}
    return force or graph.is_stale(stage, touched)


def _submit(
    stage: Stage,
    schedule: Schedule,
    futures: Mapping[str, PrefectFuture[Any]],
    results: Mapping[str, StageResult],
) -> PrefectFuture[Any]:
    named = run_stage.with_options(
        name=stage.name,
        task_run_name=stage.name,
        retries=stage.retries,
        retry_delay_seconds=exponential_backoff(schedule.retry_delay_seconds),
        retry_jitter_factor=0.5,  # two stages that met at a lock should not meet there again
    )
    # Upstream futures are finished here; naming them draws the graph on the dashboard, and Prefect itself
    # then leaves a stage with a failed upstream as `NotReady`.
    upstream = [futures[name] for name in stage.upstream if name in futures]
    stale = is_stale(stage, results, schedule.force)
    return named.submit(stage, schedule, stale, wait_for=upstream, return_state=False)


def _result(name: str, finished: PrefectFuture[Any]) -> StageResult:
    state = finished.state
    label = state.name or ""
    if state.is_completed():
        return StageResult(name, label)
    if state.is_pending():
        return StageResult(name, label, f"{name} was not run: a stage that it needs failed")
    error = finished.result(raise_on_failure=False)
    return StageResult(name, label, str(error) or label)
