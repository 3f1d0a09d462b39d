"""What the page of a flow run says of its stages: an artifact that is kept up to date while they run.

Above the table of stages stand what was changed, how many stages are done and about how long the whole still
takes: by a running stage's own progress, and by how long the others took the last time. In the end these give
way to how the run's model compares with the champion, what the run has cost, and where its results are.
"""

import contextlib
import contextvars
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self, cast
from uuid import UUID

from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger

from dgpo_core.errors import UserError, without_credentials
from dgpo_core.text import markdown_cell
from flows.execution import UNCHANGED, environment
from tasks.project.graph import Stage
from tasks.project.groups import run_group
from tasks.project.process import processor_seconds
from tasks.project.progress import duration
from tasks.tracking.lineage import PROFILES, changed_settings, settings
from tasks.tracking.runs import experiment_of, flatten
from tasks.tracking.store import tracking_uri

PRICE = "DGPO_PRICE"  # of a GPU's hour, or of a core's where a run has no GPU; in the worker's environment
INTERVAL = 10.0  # seconds between two updates
PROGRESS = re.compile(r"\[[^\]]+\] (?P<told>[\d.]+/[\d.]+ .*)")
LEFT = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)? left$")  # tasks.project.progress.duration
MOST_CHANGES = 12
WAITING, RUNNING, ENDED = "Waiting", "Running", "Ended"


@dataclass
class Row:
    """A stage on the page. `before`: the seconds that it took the last time, None where nobody knows."""

    stage: Stage
    before: float | None
    state: str = WAITING
    began: float = 0.0
    used: float = 0.0  # seconds, of earlier attempts too
    told: str = ""

    def left(self) -> float | None:
        """Return about how many seconds the stage still takes; None where nobody knows."""
        if self.state not in (WAITING, RUNNING):
            return 0.0
        known = [] if self.before is None else [self.before]
        if self.state == RUNNING:
            known = [max(0.0, before - (time.monotonic() - self.began)) for before in known]
            if found := LEFT.search(self.told):
                hours, minutes, seconds = (int(part or 0) for part in found.groups())
                known.append(3600.0 * hours + 60 * minutes + seconds)
        return max(known, default=None)


class RunPage:
    """The artifact, written by a thread of its own: a dashboard that does not answer stops no stage.

    Of `stages` those `to_run` may have something to do; `before`: the seconds that they took the last time.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        to_run: Collection[str],
        head: str = "",
        parallel: int = 1,
        before: Mapping[str, float] = MappingProxyType({}),
        price: float | None = None,
    ) -> None:
        self._rows = {
            name: Row(stage, before.get(name) if name in to_run else 0.0) for name, stage in stages.items()
        }
        self._head, self._parallel, self._price = head, parallel, price
        self._began, self._processor = time.monotonic(), processor_seconds()
        self._artifact: UUID | None = None
        self._closed = threading.Event()
        self._context = contextvars.copy_context()  # of the flow run
        self._thread = threading.Thread(target=self._keep, name="page", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say that the run has ended, where `close` has not said how."""
        if not self._closed.is_set():
            self.close("It failed." if kind and issubclass(kind, Exception) else "It was ended.")

    @contextlib.contextmanager
    def running(self, stage: str) -> Iterator[Callable[[str], None]]:
        """Show the stage as running; gives a function that takes the lines of its output."""
        row = self._rows[stage]
        row.state, row.began = RUNNING, time.monotonic()

        def line(text: str) -> None:
            if found := PROGRESS.match(text):
                row.told = found["told"]

        try:
            yield line
        finally:
            row.used += time.monotonic() - row.began
            row.state, row.told = WAITING, ""

    def ended(self, stage: str, state: str, message: str) -> None:
        """Show how the stage has ended."""
        row = self._rows[stage]
        row.state, row.told = state, message

    def close(self, said: str, below: str = "") -> str:
        """Put `said` in the place of what is left, and `below` under the table; return the text."""
        self._closed.set()
        self._thread.join()
        for row in self._rows.values():
            row.state = ENDED if row.state in (WAITING, RUNNING) else row.state
        text = self._text(said, below)
        self._write(text, said)
        return text

    def spent(self) -> str:
        """Say what the run has taken: time, hours of this machine's cores, of GPUs, and their price."""
        cores = (processor_seconds() - self._processor) / 3600
        gpus = sum(row.used * row.stage.gpus for row in self._rows.values()) / 3600
        said = f"{duration(time.monotonic() - self._began)}, {cores:.3f} core hours"
        said += f", {gpus:.3f} GPU hours" if gpus else ""
        return said if self._price is None else f"{said}, cost {self._price * (gpus or cores):.2f}"

    def progress(self) -> str:
        """Say how many stages are done, and about how long the whole still takes."""
        lefts = {name: row.left() for name, row in self._rows.items()}
        done = sum(row.state not in (WAITING, RUNNING) for row in self._rows.values())
        said = f"{done} of {len(lefts)} stages done"
        if done == len(lefts):
            return said
        ends: dict[str, float] = {}
        for name, row in self._rows.items():  # each after those that it needs
            ends[name] = max((ends.get(other, 0.0) for other in row.stage.upstream), default=0.0)
            ends[name] += lefts[name] or 0.0
        seconds = max(sum(left or 0.0 for left in lefts.values()) / self._parallel, *ends.values())
        if unknown := [name for name, left in lefts.items() if left is None]:
            more = f", more than {_minutes(seconds)} left" if seconds else ""
            return f"{said}{more} (it is not known how long these take: {', '.join(unknown)})"
        return f"{said}, about {_minutes(seconds)} left"

    def _keep(self) -> None:
        while True:
            said = self.progress()
            self._write(self._text(said), said)
            if self._closed.wait(INTERVAL):
                return

    def _text(self, said: str, below: str = "") -> str:
        lines = ["| stage | state | time | |", "| --- | --- | --- | --- |"]
        unchanged = [name for name, row in self._rows.items() if row.state == UNCHANGED]
        for name, row in self._rows.items():
            if name in unchanged:
                continue
            used = row.used + (time.monotonic() - row.began if row.state == RUNNING else 0.0)
            cells = [name, row.state, duration(used) if used else "", row.told]
            lines.append(f"| {' | '.join(map(markdown_cell, cells))} |")
        table = "\n".join(lines) if len(unchanged) < len(self._rows) else ""
        rest = f"{UNCHANGED}: {', '.join(unchanged)}" if unchanged else ""
        return "\n\n".join(filter(None, [self._head, said, table, below, rest]))

    def _write(self, text: str, said: str) -> None:
        """Make the artifact, or bring it up to date; what is `said` is its description."""
        about = said.splitlines()[0]
        with contextlib.suppress(Exception):
            if self._artifact is None:
                made = self._context.run(create_markdown_artifact, text, key="pipeline", description=about)
                self._artifact = cast(UUID, made)
            else:
                self._context.run(_update, self._artifact, ArtifactUpdate(data=text, description=about))


def _update(artifact: UUID, content: ArtifactUpdate) -> None:
    with get_client(sync_client=True) as client:
        client.update_artifact(artifact, content)


def _minutes(seconds: float) -> str:
    return f"{round(seconds / 60)} min" if seconds >= 90 else "a minute" if seconds >= 45 else "half a minute"


def hourly_price() -> float | None:
    """Return what an hour of a GPU or core costs, if somebody has said it. Raises UserError."""
    text = os.environ.get(PRICE)
    try:
        return float(text) if text else None
    except ValueError:
        raise UserError(f"{PRICE}={text}: not a number") from None


def changes(tree: Path) -> str:
    """Say in which settings the run differs from its profile; nothing where one of them cannot be read."""
    params = settings(tree)
    if params is None or not (tree / PROFILES / f"{params.profile}.yaml").is_file():
        return ""
    found = [f"`{key}={value}`" for key, value in flatten(changed_settings(params, tree)).items()]
    more = f" and {len(found) - MOST_CHANGES} more" if len(found) > MOST_CHANGES else ""
    return f"Changed from {params.profile}: {', '.join(found[:MOST_CHANGES]) or 'nothing'}{more}"


def standing(tree: Path) -> str:
    """Say how the run's model compares with the champion, or why that cannot be said."""
    command = [sys.executable, "-m", "tasks.commands.promote"]
    code, said = run_group(command, tree, environment(), get_run_logger().debug)
    last = said.splitlines()[-1] if said else f"exit code {code}"
    return f"no comparison with the champion: {last.removeprefix('error: ')}" if code else last


def links(pipeline_run: str | None, tree: Path) -> list[str]:
    """Link to the report, which the run of its stage keeps, and to MLflow, where that is a server."""
    uri = without_credentials(tracking_uri())
    found: list[str] = []
    if not uri.startswith("http"):
        return found
    with contextlib.suppress(
        Exception
    ):  # a link is a convenience, and stops no run; a worktree may have none
        report = json.loads((tree / "runs" / "report" / "run.json").read_bytes())["mlflow_run"]
        page = f"{uri}/#/experiments/{experiment_of(report)}/runs/{report}/artifacts/reports/index.html"
        found.append(f"[report]({page})")
    with contextlib.suppress(Exception):
        if pipeline_run:
            page = f"{uri}/#/experiments/{experiment_of(pipeline_run)}/runs/{pipeline_run}"
            found.append(f"[MLflow]({page})")
    return found
