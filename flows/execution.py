"""One stage, brought up to date by DVC in a process group of its own."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
from prefect import get_client
from prefect.artifacts import create_markdown_artifact
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

import tasks
from dgpo_core.errors import InfrastructureError
from flows.alerts import teller_of_collapse
from flows.server import wait_for_server
from flows.workspace import LOCK_MESSAGES
from tasks.project.graph import Stage
from tasks.project.groups import run_group
from tasks.project.paths import AUDIT_SUMMARY
from tasks.stages.stage import FAILURE, STATE
from tasks.tracking.store import tracking_uri

GPU_LIMIT = "dgpo-gpu"  # Prefect's global concurrency limit; `dgpo deploy` creates it
LEASE = 300.0  # seconds after which Prefect frees slots whose holder is silent; it renews them before
UNCHANGED, COMPLETED = "Unchanged", "Completed"  # names of a stage's state on the dashboard
# What DVC says when it did not execute the stage, and the state's name for it on the dashboard.
SKIP_MESSAGES = {"didn't change, skipping": UNCHANGED, "is cached - skipping run": "Restored"}
# What DVC advises after each stage, to people at a terminal.
ADVICE = re.compile(
    r"(To track|To enable|Use `dvc push`|\s*git add dvc\.lock$|\s*dvc config core\.autostage)"
)


class StageFailed(Exception):
    """A stage ended with an error; `retryable` when the same again may succeed."""

    def __init__(self, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


def execute(
    stage: Stage,
    tree: Path,
    log: Callable[[str], None],
    shown: contextlib.AbstractContextManager[Callable[[str], None]],
    *,
    force: bool,
    pull: bool,
) -> str:
    """Run `dvc repro --single-item` and return how it ended: `Completed`, `Unchanged` or `Restored`.

    Lines of output go to `log`, and to what `shown` gives while the stage has what it needs. `pull` gets what
    is missing from DVC's remote. Waits for as many slots of the limit GPU_LIMIT as the stage has GPUs. Raises
    StageFailed.
    """
    failure = tree / STATE / stage.name / FAILURE
    failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tasks.commands.pipeline", "--single-item"]
    command += [flag for flag, wanted in (("--force", force), ("--pull", pull)) if wanted]
    seconds = stage.timeout_minutes and stage.timeout_minutes * 60
    tell = teller_of_collapse()
    with _slots(stage), shown as show:

        def on_line(line: str) -> None:
            if not ADVICE.match(line):
                log(line)
                show(line)
                tell(line)

        try:
            code, tail = run_group([*command, stage.name], tree, environment(), on_line, seconds)
        except subprocess.TimeoutExpired:
            minutes = f"{stage.timeout_minutes:g} minutes"
            raise StageFailed(f"{stage.name}: not done after {minutes}", retryable=False) from None
    if code:
        raise _explain(stage.name, code, tail, failure)
    return next((state for text, state in SKIP_MESSAGES.items() if text in tail), COMPLETED)


def environment() -> dict[str, str]:
    """Return our environment, with this source tree and this store wherever the stage runs."""
    source = str(Path(tasks.__file__).resolve().parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "MLFLOW_TRACKING_URI": tracking_uri()}
    quiet = {"PYTHONWARNINGS": "ignore::FutureWarning"}  # of libraries, to their authors
    return {**quiet, **os.environ, **ours, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def _slots(stage: Stage) -> Iterator[None]:
    """Wait for the stage's slots of the server's limit, if there is one. Raise StageFailed for too many.

    A server that is away is waited for, before and after. It frees the slots of a process that was killed
    LEASE seconds later.
    """
    if not stage.gpus:
        yield
        return
    wait_for_server(PREFECT_API_URL.value())
    with contextlib.suppress(ObjectNotFound), get_client(sync_client=True) as client:
        limit = client.read_global_concurrency_limit_by_name(GPU_LIMIT)
        if limit.active and limit.limit < stage.gpus:  # Prefect refuses: no waiting would help
            raise StageFailed(
                f"{stage.name}: wants {stage.gpus} slots of the limit `{GPU_LIMIT}`, which has "
                f"{limit.limit}: run `dgpo deploy --gpus {stage.gpus}` if there are so many GPUs, "
                "or lower workers.gpus",
                retryable=False,
            )
    with contextlib.ExitStack() as slots:
        slots.enter_context(concurrency(GPU_LIMIT, occupy=stage.gpus, lease_duration=LEASE))
        try:
            yield
        finally:  # what the stage has made counts, whether or not the server can be told
            with contextlib.suppress(InfrastructureError, httpx.TransportError):
                wait_for_server(PREFECT_API_URL.value())
                slots.close()


SUMMARIES = {"audit": AUDIT_SUMMARY}  # what stages write for a dashboard, as Markdown


def publish_summary(stage: str, tree: Path) -> None:
    """Show a stage's summary on the dashboard, if it writes one."""
    if stage in SUMMARIES:
        with contextlib.suppress(Exception):  # a dashboard that does not answer stops no stage
            text = (tree / SUMMARIES[stage]).read_text(encoding="utf-8")
            create_markdown_artifact(text, key=stage, description=f"What the stage {stage} found")


def _explain(stage: str, code: int, log: str, failure: Path) -> StageFailed:
    """Say why `dvc repro` failed: in the stage's own words, or in DVC's last line."""
    if failure.is_file():
        reason = json.loads(failure.read_text(encoding="utf-8"))
        return StageFailed(f"{stage}: {reason['kind']}: {reason['message']}", bool(reason["retryable"]))
    locked = any(message in log for message in LOCK_MESSAGES)
    errors = [line for line in log.splitlines() if line.startswith("ERROR")] or log.splitlines()[-1:]
    return StageFailed(f"{stage}: {' '.join(errors) or f'exit code {code}'}", retryable=locked)
