"""How a program of ours ends: with an exit code and one line, with its parent, and cleanly on signals."""

import contextlib
import ctypes
import os
import platform
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from dgpo_core.errors import InfrastructureError, UserError

PR_SET_PDEATHSIG = 1
TERMINATED = 128 + signal.SIGTERM


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, on Linux (elsewhere: nothing).

    `dvc repro` does not end its stage when it is killed; without this the stage would go on, unseen.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def run_program(
    function: Callable[[], object], failed: Callable[[BaseException], None] = lambda error: None
) -> NoReturn:
    """Run a program and exit: 0, 2 for the user's fault, 1 for others (a traceback only for a bug).

    `failed` is called with the error of a program that does not exit with 0.
    """
    exit_on_signals()
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # whoever started it has closed it (>&-)
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115 - as long as the process
    code = 0
    try:
        function()
    except BaseException as caught:
        from tasks.project.resources import resource_error  # only what fails needs it

        error = resource_error(caught, Path.cwd()) or caught
        with contextlib.suppress(OSError):  # nobody may be reading any more
            code = _explain(error)
        if code:
            failed(error)
    sys.exit(code)


def _explain(error: BaseException) -> int:
    """Print what went wrong and return the exit code."""
    match error:
        case UserError():
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            return 2
        case InfrastructureError():
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            return 1
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 1


def one_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    if isinstance(error, SystemExit):
        return f"stopped with exit code {error.code}"
    return " ".join(str(error).split()) or type(error).__name__


def is_worker() -> bool:
    """Tell whether this is one of several processes that a launcher has started for a stage (launch.py)."""
    return "LOCAL_RANK" in os.environ


def follows() -> bool:
    """Tell whether this is a worker, and not the one that writes."""
    return is_worker() and os.environ["RANK"] != "0"


def die_with_stage(grace: float) -> None:
    """Kill this worker `grace` seconds after its parent's death: inside a collective whose partners are
    gone, Python never gets to the SIGTERM that `die_with_parent` has ordered."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP (a closed terminal) into SystemExit(143 or 129), so that `with` and `finally`
    blocks clean up. SIGHUP stays ignored where it is, as under `nohup`.

    Only the first one counts: a closed terminal, the end of a process group and the death of the parent all
    send one, and the second must not interrupt the cleaning up.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, leave)


def began(pid: int) -> str | None:
    """Return when a process of this machine began, in words that no correction of the clock changes.

    None when it is gone. A later process with the same number began at another time.
    """
    if sys.platform != "linux":
        import psutil  # every program imports this file

        try:
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
        except psutil.Error:
            return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return None if state == "Z" else f"{boot} {fields[18]}"  # in clock ticks after it


def processor_seconds() -> float:
    """Return the processor time of this process's threads and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> str:
    """Name this machine's cores and processor, and the GPU if this process works on one."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux alone has it
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    parts = [f"{os.cpu_count()} cores", *([name] if name else [])]
    torch = sys.modules.get("torch")  # slow to import: whoever has not, uses no GPU
    if torch and torch.cuda.is_initialized():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(parts)
