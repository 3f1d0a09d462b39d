"""The pipeline as a Prefect flow: one task for each stage of DVC's graph.

    python -m flows.pipeline run [--target STAGE ...]     run it now
    python -m flows.pipeline serve                        deployment `pipeline/local`, for the dashboard

A task runs `dvc repro --single-item <stage>`: DVC alone decides whether a stage has to be executed, so
Prefect's own caching is off, and `dvc repro` afterwards finds everything up to date.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import Task, flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

import tasks
from dgpo_core.errors import UserError
from flows.dag import Stage, read_dag
from flows.process import end_all, run_group
from tasks.preflight import preflight
from tasks.progress import duration
from tasks.show import RESULTS, load_results, markdown
from tasks.stage import FAILURE, STATE
from tasks.stage import main as run_program
from tasks.tracking import PIPELINE_RUN, Pipeline, tracking_uri

# What DVC says when another process holds one of its locks; trying again is the cure.
LOCK_MESSAGES = ("Unable to acquire lock", "it is being blocked by", "RWLock-file")
# What DVC says when it did not execute the stage, and the state's name for it on the dashboard.
SKIP_MESSAGES = {"didn't change, skipping": "Unchanged", "is cached - skipping run": "Restored"}


class StageFailed(Exception):
    """A stage ended with an error; `retryable` when the same again may succeed."""

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class PipelineFailed(Exception):
    """At least one stage failed or was not run."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: Prefect's state name and seconds from submission."""

    stage: str
    state: str
    seconds: float
    message: str = ""


def _is_retryable(_task: Task[..., Any], _run: Any, state: State[Any]) -> bool:
    return isinstance(state.data, StageFailed) and state.data.retryable


@task(cache_policy=NO_CACHE, persist_result=False, retry_condition_fn=_is_retryable)
def run_stage(stage: str, root: Path, timeout_minutes: float | None) -> State[None]:
    """Bring one stage up to date. Raises StageFailed."""
    failure = root / STATE / stage / FAILURE
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tasks.pipeline", "--single-item", stage]
    seconds = timeout_minutes and timeout_minutes * 60
    try:
        code, log = run_group(command, root, _environment(), get_run_logger().info, seconds)
    except subprocess.TimeoutExpired:
        raise StageFailed(f"{stage}: not done after {timeout_minutes:g} minutes", retryable=False) from None
    if code:
        raise _explain(stage, code, log, failure)
    name = next((state for text, state in SKIP_MESSAGES.items() if text in log), "Completed")
    return Completed(name=name, message=f"{stage}: {name.lower()}")


@flow(name="pipeline", task_runner=ThreadPoolTaskRunner(), persist_result=False)  # type: ignore[arg-type]
def pipeline(
    targets: list[str] | None = None,
    max_parallel: int = 1,
    root: Path = Path(),
    retry_delay_seconds: float = 5,
) -> None:
    """Bring the pipeline, or `targets` and what they need, up to date.

    At most `max_parallel` stages run side by side. A stage whose upstream failed is not run; the others are.
    Raises UserError for bad arguments and PipelineFailed when a stage failed.
    """
    if max_parallel < 1:
        raise UserError(f"max_parallel must be at least 1, not {max_parallel}")
    root = root.resolve()
    preflight(root)
    stages = read_dag(root, targets)
    parent = Pipeline("pipeline", {"flow": "prefect"})
    if parent.run_id:
        os.environ[PIPELINE_RUN] = parent.run_id
    outcomes: list[Outcome] = []
    succeeded = False
    try:
        outcomes = _run_all(stages, root, max_parallel, retry_delay_seconds)
        succeeded = all(outcome.message == "" for outcome in outcomes)
    finally:
        end_all()  # nothing is left, unless the flow was cancelled or killed
        os.environ.pop(PIPELINE_RUN, None)
        parent.close(succeeded)
    create_markdown_artifact(_summary(outcomes, root), key="pipeline", description="Stages and results")
    if not succeeded:
        raise PipelineFailed("; ".join(outcome.message for outcome in outcomes if outcome.message))


def _run_all(
    stages: dict[str, Stage], root: Path, max_parallel: int, retry_delay_seconds: float
) -> list[Outcome]:
    order = TopologicalSorter({stage.name: stage.upstream for stage in stages.values()})
    order.prepare()
    futures: dict[str, PrefectFuture[Any]] = {}
    started: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    ready: list[str] = []
    while order.is_active():
        ready += order.get_ready()
        running = [name for name in futures if name not in outcomes]
        for name in ready[: max_parallel - len(running)]:
            ready.remove(name)
            started[name] = time.monotonic()
            futures[name] = _submit(stages[name], root, futures, retry_delay_seconds)
            running.append(name)
        finished = next(as_completed([futures[name] for name in running]))
        finished.wait()  # the future is told of its final state a moment later
        name = next(name for name in running if futures[name] is finished)
        outcomes[name] = _outcome(name, finished, time.monotonic() - started[name])
        order.done(name)
    return list(outcomes.values())


def _submit(
    stage: Stage, root: Path, futures: dict[str, PrefectFuture[Any]], retry_delay_seconds: float
) -> PrefectFuture[Any]:
    named = run_stage.with_options(
        name=stage.name,
        task_run_name=stage.name,
        retries=stage.retries,
        retry_delay_seconds=retry_delay_seconds,
        retry_jitter_factor=0.5,  # two stages that met at a lock should not meet there again
    )
    # Upstream futures are finished here; naming them draws the graph on the dashboard, and Prefect itself
    # then leaves a stage with a failed upstream as `NotReady`.
    upstream = [futures[name] for name in stage.upstream]
    return named.submit(stage.name, root, stage.timeout_minutes, wait_for=upstream, return_state=False)


def _outcome(name: str, finished: PrefectFuture[Any], seconds: float) -> Outcome:
    state = finished.state
    label = state.name or ""
    if state.is_completed():
        return Outcome(name, label, seconds)
    if state.is_pending():
        return Outcome(name, label, 0, f"{name} was not run: a stage that it needs failed")
    error = finished.result(raise_on_failure=False)
    return Outcome(name, label, seconds, str(error) or label)


def _explain(stage: str, code: int, log: str, failure: Path) -> StageFailed:
    """Why `dvc repro` failed: the stage's own word, or DVC's last line."""
    if failure.is_file():
        reason = json.loads(failure.read_text(encoding="utf-8"))
        return StageFailed(f"{stage}: {reason['kind']}: {reason['message']}", bool(reason["retryable"]))
    locked = any(message in log for message in LOCK_MESSAGES)
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return StageFailed(f"{stage}: {' '.join(errors) or f'exit code {code}'}", retryable=locked)


def _environment() -> dict[str, str]:
    """Ours, with this source tree and this store, whatever working copy the stage runs in."""
    source = str(Path(tasks.__file__).resolve().parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "MLFLOW_TRACKING_URI": tracking_uri()}
    return {**os.environ, **ours, "PYTHONUNBUFFERED": "1"}


def _summary(outcomes: Sequence[Outcome], root: Path) -> str:
    lines = ["| stage | state | time | |", "| --- | --- | --- | --- |"]
    for outcome in outcomes:
        message = outcome.message.replace("|", "\\|")
        lines.append(f"| {outcome.stage} | {outcome.state} | {duration(outcome.seconds)} | {message} |")
    with contextlib.suppress(UserError):  # no results: not every pipeline or target has them
        lines += ["", markdown(load_results(root / RESULTS))]
    return "\n".join(lines)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    target: Annotated[list[str] | None, typer.Option(help="stage to bring up to date; repeatable")] = None,
    max_parallel: Annotated[int, typer.Option(help="stages side by side")] = 1,
) -> None:
    """Run the pipeline now."""
    try:
        pipeline(targets=target or None, max_parallel=max_parallel)
    except PipelineFailed as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def serve() -> None:
    """Wait for runs that are started from the dashboard (deployment `pipeline/local`)."""
    pipeline.serve(name="local")


if __name__ == "__main__":
    run_program(app)
