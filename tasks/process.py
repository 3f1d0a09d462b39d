"""The process a stage runs in: it ends with its parent, and ends cleanly when asked to."""

import ctypes
import os
import resource
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1
TERMINATED = 128 + signal.SIGTERM


def die_with_parent() -> None:
    """On Linux, have the kernel send SIGTERM to this process when its parent dies (elsewhere: nothing).

    `dvc repro` does not end its stage when it is killed; without this the stage would go on, unseen.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


def exit_on_sigterm() -> None:
    """Turn SIGTERM into SystemExit(143), so that `with` and `finally` blocks clean up.

    Only the first one counts: ending a process group and the death of the parent both send it, and the
    second must not interrupt the cleaning up.
    """

    def leave(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, leave)


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
