"""The pipeline as Prefect flows.

    dgpo run [--target STAGE ...] [--from-stage STAGE] [--force] [--dry-run]

`stages` brings a checkout up to date: `dgpo run` does so with yours. `pipeline` is what the deployments
run (prefect.yaml): each run in a git worktree of its own, its results committed on the branch `runs/<run>`.
A task runs `dvc repro --single-item <stage>`: DVC alone decides whether a stage has to be executed, so
Prefect's own caching is off, and `dvc repro` afterwards finds everything up to date.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import State, flow, get_client
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from dgpo_core.config.params import PARAMS, read_yaml, resolve_profile
from dgpo_core.errors import InfrastructureError, UserError
from flows.execution import COMPLETED, UNCHANGED
from flows.page import RunPage, changes, hourly_price, links, standing
from flows.promotion import offer
from flows.remote import cancel_all, refuse_without_push
from flows.schedule import Schedule, StageResult, is_stale, run_all
from flows.server import ending_without_server
from flows.settings import DEFAULTS, PipelineSettings, with_overrides
from flows.workspace import (
    Workspace,
    claim_name,
    enter_project,
    one_at_a_time,
    open_workspace,
    publish,
    restore_outputs,
)
from tasks.commands.cli import run_as
from tasks.commands.pipeline import side_by_side
from tasks.commands.preflight import preflight
from tasks.commands.show import RESULTS, load_results, markdown
from tasks.commands.use import profile_path
from tasks.project.dvc import refuse_second
from tasks.project.git import changed_files
from tasks.project.graph import Stage, read_dag, select
from tasks.project.groups import end_all
from tasks.tracking.runs import PIPELINE_RUN, Pipeline

MAX_RESTARTS = 5  # of one flow run: a machine that kills it every time will not be cured by trying again


class PipelineFailed(Exception):
    """At least one stage failed or was not run."""


@flow(name="stages", task_runner=ThreadPoolTaskRunner(), persist_result=False)  # type: ignore[arg-type]
def stages(
    root: Path = Path(), settings: PipelineSettings = DEFAULTS, retry_delay_seconds: float = 5
) -> State[None] | None:
    """Bring the stages of the checkout `root` up to date, in place.

    Of `settings`, those that choose stages and say how to run them count. Raises UserError for bad arguments
    and PipelineFailed when a stage failed; Prefect's log has the message, without a traceback.
    """
    try:
        _bring_up_to_date(root.resolve(), settings, None, retry_delay_seconds)
    except (UserError, PipelineFailed) as error:
        return Failed(message=str(error), data=error)  # which Prefect raises where the flow was called
    return None


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(), persist_result=False)  # type: ignore[arg-type]
def pipeline(settings: PipelineSettings = DEFAULTS) -> State[None] | None:
    """Run the pipeline in a worktree of its own and commit the results on the branch runs/<flow-run-name>.

    Started again after a crash, or with Retry, it continues in its worktree. What is to blame on settings,
    stages or servers is the message of its failed state, without a traceback.
    """
    try:
        root = enter_project()
        refuse_endless_restarts()
        if len(settings.seeds) > 1:
            _each_seed(settings)
            return None
        name = claim_name(root, str(flow_run.name), str(flow_run.id))
        with one_at_a_time(root, name):
            return Completed(message=_in_workspace(root, name, settings) or None)
    except (UserError, InfrastructureError, PipelineFailed) as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error))


def refuse_endless_restarts() -> None:
    """Raise UserError in a run that automations have started again MAX_RESTARTS times, all in vain."""
    before = flow_run.run_count - 1
    if before > MAX_RESTARTS:
        raise UserError(
            f"this run was started {before} times and ended each time: see its log; a new run finds what "
            "this one has finished in DVC's cache"
        )


def warn_of_changes(root: Path, revision: str = "HEAD") -> None:
    """Warn where the checkout has something that its commit does not have, which is what runs.

    Of dvc.lock, which `make demo` writes, nothing is said: what it names comes from DVC's cache in any case.
    """
    if changed := changed_files(".", ":(exclude)dvc.lock", root=root):
        names = ", ".join(changed)
        get_run_logger().warning("%s: not committed, so not part of this run of %s", names, revision)


def _in_workspace(root: Path, name: str, settings: PipelineSettings) -> str:
    workspace = _open(root, name, settings)
    try:
        said = _bring_up_to_date(workspace.tree, settings, workspace)
        if settings.promote and not settings.dry_run:
            workspace.save(f"{workspace.tree.name}: {_title(settings)}")  # what is offered has a commit
            said = offer(workspace.tree)
    finally:
        if settings.dry_run:
            workspace.discard()
        else:
            commit = workspace.save(f"{workspace.tree.name}: {_title(settings)}")
            get_run_logger().info("results: git checkout %s (%s), dvc checkout", workspace.branch, commit[:8])
            publish(workspace, [])
    if not settings.dry_run and not settings.keep_worktree:
        workspace.remove()
    return said


def _each_seed(settings: PipelineSettings) -> None:
    """Run a flow below this one for each seed; one that fails does not stop the others."""
    failures = []
    for seed in settings.seeds:
        state = pipeline(settings.model_copy(update={"seeds": [seed]}), return_state=True)
        if not state.is_completed():
            failures.append(f"seed {seed}: {state.message}")
    if failures:
        raise PipelineFailed("; ".join(failures))


def _open(root: Path, name: str, settings: PipelineSettings) -> Workspace:
    """Open the run's worktree with the parameters that the settings ask for."""
    warn_of_changes(root, settings.revision)
    _tag(settings)
    workspace = open_workspace(root, name, settings.revision)
    path = workspace.tree / PARAMS
    try:
        if settings.profile:
            params = resolve_profile(profile_path(settings.profile, workspace.tree), settings.recipes or None)
        elif settings.recipes:
            raise UserError("recipes: they are laid over a profile; give profile too")
        else:
            params = read_yaml(path)
        changed = with_overrides(params, settings.changes)
        if settings.seeds:
            changed["seed"] = settings.seeds[0]
        workspace.write_params(changed, f"Written by the run {name}: {_title(settings)}")
    except (UserError, ValueError) as error:
        workspace.discard()
        raise UserError(f"this run's settings: {' '.join(str(error).split())}") from None
    restore_outputs(workspace.tree)
    return workspace


def _title(settings: PipelineSettings) -> str:
    """Say what is special about a run, for commit messages and comments."""
    return ", ".join(_special(settings) if settings.profile else [PARAMS.name, *_special(settings)])


def _special(settings: PipelineSettings) -> list[str]:
    profile = [settings.profile] if settings.profile else []
    return [*profile, *settings.changes, *(f"seed={seed}" for seed in settings.seeds)]


def _tag(settings: PipelineSettings) -> None:
    """Show on lists of runs what is special about this one."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        tags = dict.fromkeys([*flow_run.tags, *_special(settings)])
        client.update_flow_run(UUID(str(flow_run.id)), tags=list(tags))


def _bring_up_to_date(
    tree: Path, settings: PipelineSettings, workspace: Workspace | None, retry_delay_seconds: float = 5
) -> str:
    """Run what is stale of the chosen stages, and return what can be said of the result in a sentence."""
    preflight(tree)
    chosen = select(read_dag(tree), settings.targets, settings.from_stage)
    may_run = _may_run(chosen, settings.force)
    if settings.dry_run:
        create_markdown_artifact(_forecast(may_run), key="dry-run", description="What would run")
        print(_forecast(may_run))
        return "a dry run"
    if workspace:
        refuse_without_push((stage for stage in chosen.values() if may_run[stage.name]), workspace.root)
    price, name, id_ = hourly_price(), str(flow_run.name), str(flow_run.id)
    parent = Pipeline(name, {"flow": "prefect", "prefect.flow_run": name, "prefect.flow_run_id": id_}, tree)
    os.environ[PIPELINE_RUN] = parent.run_id or ""
    parallel, force = settings.max_parallel or side_by_side(tree), settings.force
    to_run = [name for name, said in may_run.items() if said]
    page = RunPage(chosen, to_run, changes(tree), parallel, parent.earlier_seconds(), price)
    schedule = Schedule(chosen, tree, page, workspace, parallel, force, retry_delay_seconds, parent.run_id)
    failures, succeeded, ended = "", False, False
    try:
        with page:
            try:
                with ending_without_server(PREFECT_API_URL.value()):
                    results = run_all(schedule)
            finally:
                end_all()  # nothing is left, unless the flow was cancelled or killed
                cancel_all()
            failures = "; ".join(result.message for result in results if result.message)
            succeeded = not failures
            executed = any(result.state != UNCHANGED for result in results)
            said = failures or (standing(tree) if executed and "report" in chosen else "")
            where = [page.spent(), *links(parent.run_id if executed else None, tree), *_checkout(workspace)]
            print(page.close("\n\n".join(filter(None, [said, " · ".join(where)])), _results(tree)))
    except BaseException as error:
        ended = not isinstance(error, Exception)  # cancelled, or Ctrl-C
        raise
    finally:
        os.environ.pop(PIPELINE_RUN, None)
        parent.close(succeeded, list(chosen), ended)
    if failures:
        raise PipelineFailed(failures)
    return said


def _checkout(workspace: Workspace | None) -> list[str]:
    """Say how the results of a run in a worktree get into a checkout."""
    return [f"`git checkout {workspace.branch} && dvc checkout`"] if workspace else []


def _forecast(may_run: Mapping[str, str]) -> str:
    """Say what a run would do, as a table."""
    lines = ["| stage | |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {said or 'unchanged'} |" for name, said in may_run.items()])


def _may_run(chosen: Mapping[str, Stage], force: bool) -> dict[str, str]:
    """Say for each stage whether a run would execute it; empty where it is unchanged for sure."""
    results: dict[str, StageResult] = {}
    found = {}
    for name, stage in chosen.items():
        stale = is_stale(stage, results, force)
        results[name] = StageResult(name, COMPLETED if stale else UNCHANGED)
        sure = force or stage.changed
        found[name] = "would run" if sure else "may run: it needs one of these" if stale else ""
    return found


def _results(tree: Path) -> str:
    """Return the results as a table; nothing where there are none: not every pipeline or target has them."""
    with contextlib.suppress(UserError):
        return markdown(load_results(tree / RESULTS))
    return ""


def run(
    target: list[str] | None,
    from_stage: str | None,
    force: bool,
    dry_run: bool,
    max_parallel: int | None,
    **_server: object,
) -> None:
    """Run the stages now, in this checkout: `dgpo run`."""
    if not target:
        refuse_second()
    chosen: dict[str, Any] = {"targets": list(target or []), "from_stage": from_stage, "force": force}
    try:
        stages(settings=PipelineSettings(**chosen, dry_run=dry_run, max_parallel=max_parallel))
    except PipelineFailed as error:
        raise InfrastructureError(str(error)) from None


if __name__ == "__main__":
    run_as("run", run)
