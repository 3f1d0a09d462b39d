"""Commands in process groups of their own, so that nothing they started outlives them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE = 15.0  # seconds between SIGTERM and SIGKILL: a stage removes half-written outputs meanwhile
TAIL = 60  # lines kept for finding out why a command failed

_running: set[subprocess.Popen[str]] = set()
_ended: set[subprocess.Popen[str]] = set()  # by end_all


class Ended(Exception):
    """What was done has not failed: it was ended, with its flow or by being `cancelled`."""

    def __init__(self, cancelled: bool = False) -> None:
        super().__init__("cancelled" if cancelled else "ended")
        self.cancelled = cancelled


def run_group(
    command: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    on_line: Callable[[str], None],
    timeout: float | None = None,
) -> tuple[int, str]:
    """Run `command`, give each line of its output to `on_line`, and return (exit code, last lines).

    Raises subprocess.TimeoutExpired after `timeout` seconds and Ended after `end_all`. However it ends, its
    whole group is ended.
    """
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,  # a terminal would stop who reads it and is not in front
        process_group=0,  # of the same session: the kernel shares cores by session first, by niceness then
    )
    _running.add(process)
    tail: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=_read, args=(process, tail, on_line), daemon=True)
    reader.start()
    try:
        code = process.wait(timeout)
    finally:
        end_group(process)
        reader.join(GRACE)
        _running.discard(process)
    if process in _ended:
        _ended.discard(process)
        raise Ended
    return code, "\n".join(tail)


def end_all() -> None:
    """End every running group: for the moment when the flow itself is cancelled or killed."""
    for process in list(_running):
        _ended.add(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # all at once, then wait for each
    for process in list(_running):
        end_group(process)


def end_group(process: subprocess.Popen[str], grace: float = GRACE) -> None:
    """Send SIGTERM to the group of `process`, and SIGKILL after `grace` seconds to what is left of it."""
    deadline = time.monotonic() + grace
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # reaps the leader: a dead but unreaped process still counts as a member
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(process: subprocess.Popen[str], tail: deque[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        text = line.rstrip()
        if text:
            tail.append(text)
            on_line(text)
