"""`dgpo experiments`: what `dvc exp run` has tried, with the working tree and HEAD, for a terminal.

`dvc exp show` has a column for every metric and parameter, 350 of them. Here a row has what it changes
against HEAD, and each compared model's average EM.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from tasks.project.dvc import require_dvc
from tasks.project.paths import METRICS
from tasks.tracking.runs import flatten

CELL = 9  # columns of the terminal that a figure takes
ROOM = 50  # that the first two columns want


@dataclass(frozen=True)
class Row:
    """A state of the project: the working tree, HEAD or an experiment."""

    name: str
    params: dict[str, str] = field(default_factory=dict)
    average: dict[str, float] = field(default_factory=dict)  # EM by model
    missing: bool = False  # some of its metrics are neither in the cache nor in git


def show(commits: bool) -> None:
    """Print the table; `commits`: with the experiments of all commits, not of HEAD alone. Raise UserError."""
    require_dvc()
    models = load_params().compare
    found = rows(models, commits)
    console = Console(highlight=False, soft_wrap=False)
    console.print(table(found, models, console.width))
    head = next((row for row in found[1:]), None)
    if head and head.missing:
        console.print(
            f"{head.name} has no results here: its dvc.lock in git is not that of a run on this machine. To "
            f"compare with what the working tree has: git commit -m Results dvc.lock {PARAMS}"
        )
    console.print(
        "everything: dvc exp show, dvc metrics diff, dvc params diff; take one over: dvc exp apply NAME"
    )


def rows(models: list[str], commits: bool = False) -> list[Row]:
    """Return working tree, HEAD and its experiments with the EM of `models`; `commits`: of all commits.

    Raise UserError where DVC does not show them.
    """
    states = _asked(commits)
    try:
        return list(_rows(states, models))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"DVC shows experiments in a form that is not known here ({why})") from error


def table(rows: list[Row], models: list[str], width: int) -> Table:
    """Return what each row changes against HEAD, the second one, and the EM of as many models as fit.

    The last model comes first.
    """
    head = rows[1].params if len(rows) > 1 else {}
    known = [model for model in reversed(models) if any(model in row.average for row in rows)]
    shown = known[: max(1, (width - ROOM) // CELL)]
    made = Table(title="Average EM of each model; what was changed against HEAD")
    made.add_column("experiment", overflow="fold")
    made.add_column("changed", overflow="fold")
    for model in shown:
        made.add_column(model, justify="right", no_wrap=True, max_width=CELL)
    for row in rows:
        figures = [f"{row.average[model]:.3f}" if model in row.average else "-" for model in shown]
        made.add_row(row.name, "\n".join(changes(head, row.params)), *figures)
    return made


def changes(head: dict[str, str], params: dict[str, str]) -> list[str]:
    """Return `key=value` for every parameter that is not HEAD's."""
    keys = sorted(key for key in head.keys() | params.keys() if head.get(key) != params.get(key))
    return [f"{key}={params.get(key, '(none)')}" for key in keys] if params else []


def _asked(commits: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *(["--all-commits"] if commits else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        states: list[dict[str, Any]] = parsed_json(done.stdout)
    except ValueError:
        reason = " ".join(done.stderr.split()).removeprefix("ERROR: ")
        raise UserError(f"DVC does not show experiments: {reason}") from None
    return states


def _rows(states: list[dict[str, Any]], models: list[str]) -> Iterator[Row]:
    for state in states:
        name = "working tree" if state["rev"] == "workspace" else state.get("name") or state["rev"][:7]
        yield _row(name, state, models)
        for found in state.get("experiments") or []:
            last, executor = found["revs"][-1], found.get("executor") or {}
            doing = "" if executor.get("state") in (None, "success") else f" ({executor['state']})"
            yield _row(f"  {last.get('name') or found.get('name') or last['rev'][:7]}{doing}", last, models)


def _row(name: str, state: dict[str, Any], models: list[str]) -> Row:
    data = state.get("data") or {}
    metrics = data.get("metrics") or {}
    read = {model: metrics.get(f"{METRICS}/evaluate-{model}.json", {}).get("data") or {} for model in models}
    average = {model: values["average"] for model, values in read.items() if "average" in values}
    params = (data.get("params") or {}).get(str(PARAMS), {}).get("data") or {}
    return Row(name, flatten(params), average, any("error" in entry for entry in metrics.values()))
