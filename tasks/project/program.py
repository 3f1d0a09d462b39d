"""How a program of ours ends: an exit code, one line for people, and why it failed in a file for flows.

`dvc repro` exits 255 whatever happened in a stage; so the reason is left in `.state/<stage>/failure.json`.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, NoReturn

from dgpo_core.errors import InfrastructureError, ResourceError, UserError
from dgpo_core.files import remove, write_json
from tasks.project.process import exit_on_signals, is_worker
from tasks.project.resources import resource_error
from tasks.project.servers import adopt

STATE = Path(".state")
FAILURE = "failure.json"


def run_program(function: Callable[[], None]) -> NoReturn:
    """Run `function` and exit: 0, 2 for the user's fault, 1 for others (a traceback only for a bug).

    Under DVC whatever fails before the stage itself begins is recorded as the stage's failure too.
    """
    exit_on_signals()
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # whoever started it has closed it (>&-)
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the process
    dvc_stage = os.environ.get("DVC_STAGE")  # set by DVC
    code = 0
    try:
        if dvc_stage and not is_worker():
            remove(failure_file(dvc_stage))
        adopt()
        function()
    except BaseException as caught:
        error = resource_error(caught, Path.cwd()) or caught
        with suppress(OSError):  # nobody may be reading any more
            code = _explain(error)
        if dvc_stage and code:
            record_failure(dvc_stage, error)
    sys.exit(code)


def failure_file(stage: str) -> Path:
    """Return where the reason of a stage's failure is; DVC's name of the stage counts more than its own."""
    return STATE / (os.environ.get("DVC_STAGE") or stage) / FAILURE


def record_failure(stage: str, error: BaseException) -> None:
    """Write why the stage failed, as far as that can be written: it is on standard error too."""
    kind: Literal["user", "infrastructure", "bug"] = "bug"
    if isinstance(error, UserError):
        kind = "user"
    elif isinstance(error, InfrastructureError) or not isinstance(error, Exception):
        kind = "infrastructure"  # the latter: somebody stopped it, and trying again is up to them
    retryable = isinstance(error, InfrastructureError) and not isinstance(error, ResourceError)
    path = failure_file(stage)
    failure = {
        "stage": os.environ.get("DVC_STAGE") or stage,
        "kind": kind,
        "retryable": retryable,
        "message": _one_line(error),
    }
    with suppress(OSError):
        if path.exists() and (is_worker() or isinstance(error, SystemExit)):
            return  # what failed first is the reason; the other processes fail because of it
        write_json(path, failure)


def _explain(error: BaseException) -> int:
    """Print what went wrong and return the exit code."""
    match error:
        case UserError():
            print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
            return 2
        case InfrastructureError():
            print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
            return 1
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 1


def _one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"stopped with exit code {error.code}"
    return " ".join(str(error).split()) or type(error).__name__
