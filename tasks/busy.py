"""Who has DVC's locks in a checkout: what is said in place of DVC's advice to delete them."""

import contextlib
import json
import logging
import os
import re
from datetime import datetime
from pathlib import Path

import psutil

BUSY = "another run is at work here"  # how the sentence begins
DVC_TMP = Path(".dvc", "tmp")


class LockFilter(logging.Filter):
    """Keeps what DVC logs of a lock that another process holds from the terminal, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.hit = False

    def filter(self, record: logging.LogRecord) -> bool:
        from dvc.lock import LockError

        error = record.exc_info[1] if record.exc_info else None
        while error is not None and not isinstance(error, LockError):
            error = error.__cause__
        self.hit = self.hit or error is not None
        return error is None


def at_work(root: Path = Path()) -> str:
    """Say which other process works in the checkout `root`, at which stage and since when, if known."""
    for pid in _holders(root / DVC_TMP):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            stage, since = _stage(process)
            where = f", at {stage} since {datetime.fromtimestamp(since):%H:%M}" if stage else ""
            return (
                f"{BUSY}{where} (process {pid}): wait for it or end it; beside it run `dvc exp run --temp`, "
                "or from the dashboard"
            )
    return f"{BUSY}, or was a moment ago: try again"


def _holders(folder: Path) -> list[int]:
    """Processes that live and hold a lock: of paths that a stage reads or writes, or of all of DVC."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = json.loads((folder / "rwlock").read_bytes())
        found += [holder["pid"] for holder in record.get("write", {}).values()]
        found += [holder["pid"] for holders in record.get("read", {}).values() for holder in holders]
    with contextlib.suppress(OSError):
        found += [int(number) for number in re.findall(r"\d+", (folder / "lock").read_text())[:1]]
    return [pid for pid in dict.fromkeys(found) if pid != os.getpid() and psutil.pid_exists(pid)]


def _stage(process: psutil.Process) -> tuple[str | None, float]:
    """(stage that DVC's process has started, when), or None and when it was started itself."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name := child.environ().get("DVC_STAGE"):
                return name, child.create_time()
    return None, process.create_time()
