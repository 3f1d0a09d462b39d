"""Errors of the machine under a stage (a full disk, no permission, too many open files), told in one line.

They come as OSError or, from libraries that write without Python's files (safetensors, tokenizers, torch,
SQLite), as whatever those raise, with the system's words in it.
"""

import errno
import os
import re
import shutil
from pathlib import Path

from dgpo_core.errors import InfrastructureError, ResourceError, UserError

CURES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EROFS: "have it mounted for writing, or work in another folder",
    errno.EACCES: "give this user the rights to it",
    errno.EPERM: "give this user the rights to it",
    errno.EMFILE: "raise the number of open files (ulimit -n)",
    errno.ENFILE: "end other programs, or raise the system's number of open files",
    errno.EIO: "look at the disk",
    errno.ESTALE: "look at the network's file system",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links",
}
OF_THE_USER = (errno.ENAMETOOLONG, errno.ELOOP)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
SAID = re.compile(r"os error (\d+)|\bcode: (\d+), kind|\[Errno (\d+)\]|\berrno (\d+)\b", re.IGNORECASE)
FULL = ("database or disk is full", "No space left on device")  # SQLite; whoever passes on the words only


def resource_error(error: BaseException, place: Path) -> UserError | ResourceError | None:
    """Put an error of the machine into words; None for every other error.

    `place` is named where the error names no file: what was being written.
    """
    if isinstance(error, UserError | InfrastructureError) or not isinstance(error, Exception):
        return None
    chain = (error, error.__cause__, error.__context__)
    cause = next((link for link in chain if isinstance(link, OSError)), None)
    number = (cause.errno if cause else None) or _said(str(error))
    if number is None:
        return None
    path = Path(os.fsdecode(cause.filename)) if cause and _is_path(cause.filename) else place
    if number in IN_THE_WAY and cause is error:
        return _in_the_way(path)
    if number not in CURES:
        return None
    message = f"{path}: {os.strerror(number).lower()}{_room(path)}; {CURES[number]} and start again"
    if number in OF_THE_USER:
        return UserError(message)
    return ResourceError(f"{message}: it goes on where it was")


def _said(text: str) -> int | None:
    """Find the system's number of an error in a library's message."""
    if any(words in text for words in FULL):
        return errno.ENOSPC
    found = SAID.search(text)
    return int(next(filter(None, found.groups()))) if found else None


def _is_path(filename: object) -> bool:
    return isinstance(filename, str | bytes) and bool(filename)


def _in_the_way(path: Path) -> UserError | None:
    """Name a file where a folder is needed, or the other way round; otherwise the program is wrong."""
    for part in (path, *path.parents):
        if part.is_file():
            return UserError(f"{part}: a file is where a folder is needed; move it away")
    return UserError(f"{path}: a folder is where a file is needed; move it away") if path.is_dir() else None


def _room(path: Path) -> str:
    """Say how much room is left where `path` is or would be."""
    for part in (path, *path.absolute().parents):
        try:
            return f" ({shutil.disk_usage(part).free // 2**20:,} MiB are free there)"
        except OSError:
            continue
    return ""
