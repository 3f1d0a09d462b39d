"""Temporary folders that no process leaves behind: those of a killed one are removed by the next."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

OWNER = ".owner"  # suffix of the file beside a folder that its process holds a lock on


@contextmanager
def temporary_folder(purpose: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a folder `dgpo-<purpose>-...` in `parent` (by default the system's place); remove it at the end.

    First remove what killed processes have left there. The lock is the kernel's, so it ends with its process,
    however that ended, and no living process's folder is taken for one of those.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_left_over(parent)
    folder = parent / f"dgpo-{purpose}-{secrets.token_hex(4)}"
    lock = _lock(folder)
    with lock:
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            _remove(folder)


def remove_left_over(parent: Path) -> None:
    """Remove this user's temporary folders in `parent` whose processes have ended."""
    for owner in parent.glob(f"dgpo-*{OWNER}"):
        folder = owner.with_suffix("")
        try:
            if owner.lstat().st_uid == os.getuid():
                with _lock(folder).acquire(timeout=0):
                    _remove(folder)
        except (Timeout, OSError):  # its process lives; or another one is removing it right now
            continue


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + OWNER), thread_local=False)


def _remove(folder: Path) -> None:
    """Remove a folder whose lock is held; the lock's file goes last, else nobody would look there again."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        folder.with_name(folder.name + OWNER).unlink(missing_ok=True)
