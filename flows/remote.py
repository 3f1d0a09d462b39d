"""A stage on another pool's worker, which has a clone of its own.

The pipeline publishes its branch (git) and the outputs that the stage needs (DVC's remote) and starts the
deployment `stage/internal-<pool>`. That worker checks the branch out, runs the stage with `dvc repro --pull`
and pushes its outputs and DVC's run cache, with which `dvc repro` in the pipeline's worktree restores them.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast
from uuid import UUID

from prefect import State, flow, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Completed, Failed

from dgpo_core.errors import InfrastructureError, UserError
from flows.execution import StageFailed, execute
from flows.page import RunPage
from flows.server import wait_for_server
from flows.workspace import (
    BRANCHES,
    PUSH_VARIABLE,
    REMOTE,
    RUNS,
    Workspace,
    add_worktree,
    dvc,
    enter_project,
    has_remote,
    has_storage,
    one_at_a_time,
    publish,
    remove_worktree,
    share_cache,
)
from tasks.project.git import alone, ask, git
from tasks.project.graph import Stage, read_dag, select
from tasks.project.groups import Ended, end_all
from tasks.tracking.runs import PIPELINE_RUN

POOL_VARIABLE = "DGPO_POOL"  # set where a worker starts: `cpu` or `gpu`
RETRYABLE = "Retryable"  # name of the failed state of a stage that may succeed when it is run again
POLL = 2.0  # seconds

_waited_for: set[UUID] = set()


def is_elsewhere(stage: Stage) -> bool:
    """Tell whether another pool runs the stage; a run that no worker has started runs everything itself."""
    here = os.environ.get(POOL_VARIABLE)
    return here is not None and stage.pool != here


def refuse_without_push(stages: Iterable[Stage], root: Path) -> None:
    """Raise UserError where another pool has one of the stages and nobody has said how it gets the branch.

    PUSH_VARIABLE says it: 1 pushes the branch to git's remote, 0 is for workers that share one clone.
    """
    elsewhere = [stage for stage in stages if is_elsewhere(stage)]
    if elsewhere and PUSH_VARIABLE not in os.environ and has_remote(root):
        first = elsewhere[0]
        raise UserError(
            f"{first.name} belongs to the pool {first.pool}, whose worker gets this run's branch through "
            f"git's {REMOTE}: start this worker with `dgpo worker --push`, which pushes the branches of runs "
            f"(or with --no-push, if the worker of {first.pool} works in this same clone)"
        )


@flow(name="stage", flow_run_name="{run_name}: {stage}", persist_result=False)
def remote_stage(
    stage: str, run_name: str, commit: str, force: bool = False, pipeline_run: str | None = None
) -> State[None]:
    """Run one stage of the pipeline run `run_name`, at `commit` of its branch, and push what it has made."""
    root = enter_project()
    if pipeline_run:
        os.environ[PIPELINE_RUN] = pipeline_run
    folder = f"{run_name}--{stage.replace('@', '-')}"
    with one_at_a_time(root, folder):
        tree = _checkout(root, f"{BRANCHES}/{run_name}", commit, folder)
        found = select(read_dag(tree), [stage])[stage]
        log = get_run_logger().info
        try:
            with RunPage({stage: found}, [stage]) as page:
                shown = page.running(stage)
                name = execute(found, tree, log, shown, force=force, pull=has_storage(tree))
                page.ended(stage, name, "")
                page.close(f"{stage}: {name.lower()}")
        except StageFailed as error:
            return Failed(name=RETRYABLE if error.retryable else None, message=str(error))
        finally:
            end_all()
        if has_storage(tree):
            dvc("push", "--quiet", "--run-cache", stage, cwd=tree)
        remove_worktree(root, tree)
    return Completed(name=name, message=f"{stage}: {name.lower()}")


def run_elsewhere(stage: Stage, workspace: Workspace, *, force: bool, pipeline_run: str | None) -> str:
    """Have the stage's pool run it, restore its outputs here, return how it ended. Raises StageFailed."""
    try:
        publish(workspace, list(stage.upstream))
    except InfrastructureError as error:
        raise StageFailed(f"{stage.name}: {error}", retryable=True) from error
    name = workspace.tree.name
    tags = [f"run:{name}", f"stage:{stage.name}"]
    wait_for_server(PREFECT_API_URL.value())
    commit = git("rev-parse", "HEAD", cwd=workspace.tree)
    parameters = {
        "stage": stage.name,
        "run_name": name,
        "commit": commit,
        "force": force,
        "pipeline_run": pipeline_run,
    }
    child = _unfinished(tags) or cast(
        FlowRun, run_deployment(f"stage/internal-{stage.pool}", parameters=parameters, timeout=0, tags=tags)
    )
    _waited_for.add(child.id)
    get_run_logger().info("%s runs on the pool %s as %r", stage.name, stage.pool, child.name)
    state = _wait(child.id)
    _waited_for.discard(child.id)
    if state.is_cancelled():
        raise Ended(cancelled=True)
    if not state.is_completed():
        retryable = state.name == RETRYABLE or state.is_crashed()
        raise StageFailed(state.message or f"{stage.name}: {state.name}", retryable)
    log = get_run_logger().info
    unseen = contextlib.nullcontext(lambda line: None)  # the page has the stage as running already
    restored = execute(stage, workspace.tree, log, unseen, force=False, pull=True)
    if restored == "Completed":
        get_run_logger().warning("%s was executed again: DVC's remote did not have its outputs", stage.name)
    return state.name or "Completed"


def cancel_all() -> None:
    """Cancel the stages that other workers run for this process: nobody waits for them any more."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        for child in list(_waited_for):
            client.set_flow_run_state(child, Cancelling())
    _waited_for.clear()


def _checkout(root: Path, branch: str, commit: str, folder: str) -> Path:
    """Check the run's commit out in a worktree of this clone, or in an earlier attempt's with its progress.

    Raises UserError where the commit is neither in this clone nor on the branch that the remote has.
    """
    if ask("cat-file", "-e", f"{commit}^{{commit}}", root=root) is None:  # the run is another clone's
        # Not as FETCH_HEAD, which the stage of another run may overwrite meanwhile.
        kept = f"+refs/heads/{branch}:refs/remotes/{REMOTE}/{branch}"
        git("fetch", "--quiet", "--no-write-fetch-head", REMOTE, kept, cwd=root)
    tree = root / RUNS / folder
    if tree.exists():
        with alone(root):
            git("checkout", "--force", "--detach", commit, cwd=tree)
    else:
        add_worktree(root, tree, commit)
    share_cache(root, tree)
    return tree


def _unfinished(tags: list[str]) -> FlowRun | None:
    """Find the run that an earlier process of this pipeline, killed meanwhile, has started and left."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=tags)))
    return next((child for child in found if child.state and not child.state.is_final()), None)


def _wait(child: UUID) -> State[None]:
    with get_client(sync_client=True) as client:
        while True:
            state = client.read_flow_run(child).state
            if state and state.is_final():
                return state
            time.sleep(POLL)
