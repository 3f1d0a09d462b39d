"""Offer a run's model as champion: `dgpo promote` decides, and a person, if `promote.approval` is set."""

import sys
from datetime import timedelta
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.logging import get_run_logger
from pydantic import Field

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.errors import UserError
from flows.alerts import PROMOTION, tell
from flows.execution import environment
from tasks.project.dvc import read_lock
from tasks.project.groups import run_group
from tasks.tracking.registry import store

PATIENCE = timedelta(days=7)  # for a person's answer; the run fails afterwards and can be retried


class Approval(RunInput):
    """The form on the paused run's page."""

    approve: bool = Field(False, description="make this version the champion")
    comment: str = Field("", description="kept in the run's log")


def offer(tree: Path) -> str:
    """Decide about the model of `tree` with its settings, ask if asked for, and promote what passes.

    Returns a sentence about how it ended. Raises UserError when nothing can be decided.
    """
    # They bring torch: not for runs that offer nothing.
    from tasks.commands.promote import KEPT, PROMOTED
    from tasks.tracking.evaluations import offer as make_challenger

    with store() as registry:
        try:
            version = make_challenger(registry, load_params(tree / PARAMS), read_lock(tree), tree)
        except UserError as error:
            raise UserError(f"promote: {error}") from None
    code, table = _decide(tree, version.number, "--dry-run")
    shown = f"```\n{table}\n```"
    create_markdown_artifact(shown, key="promotion", description=f"Promotion of {version.name}")
    if code == KEPT:
        return f"{version.name} does not meet every condition: the champion stays"
    if code != PROMOTED:
        raise UserError(f"promote: {table.splitlines()[-1] if table else f'exit code {code}'}")
    if load_params(tree / PARAMS).promote.approval:
        get_run_logger().info("%s meets every condition and waits for approval", version.name)
        form = Approval.with_initial_data(description=f"{version.name} meets every condition:\n\n{shown}")
        answer = pause_flow_run(wait_for_input=form, timeout=int(PATIENCE.total_seconds()))
        if answer is None or not answer.approve:
            comment = answer.comment if answer else ""
            return f"{version.name} was not approved: {comment or 'no comment'}"
        get_run_logger().info("approved: %s", answer.comment or "no comment")
    code, table = _decide(tree, version.number, "--yes")
    if code != PROMOTED:
        return f"{version.name} was not promoted: {table.splitlines()[-1] if table else code}"
    tell(PROMOTION, f"{version.name} is the champion")
    return f"{version.name} is the champion"


def _decide(tree: Path, version: str, flag: str) -> tuple[int, str]:
    """Run `dgpo promote` in the run's worktree and return its exit code and its words."""
    command = [sys.executable, "-m", "tasks.commands.cli", "promote", "--version", version, flag]
    return run_group(command, tree, {**environment(), "COLUMNS": "110"}, get_run_logger().info)
