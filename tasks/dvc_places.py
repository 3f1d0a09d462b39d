"""What DVC needs besides the project: settings that can be read, and folders in which it can write.

Looked at before DVC starts: it answers with a traceback, or only when a stage has run for hours and its
outputs cannot be kept.
"""

import getpass
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError

FOLDER = Path(".dvc")
RECORD = "rwlock"  # who reads and writes what


@dataclass(frozen=True)
class Problem:
    """Why DVC cannot work here, and the cure."""

    message: str
    advice: str

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}"


def require_dvc(root: Path = Path()) -> None:
    """Raise UserError where DVC cannot work in the checkout `root`; mend what a killed DVC has left."""
    if (root / FOLDER / "tmp").is_dir():
        mend_record(root)
    for problem in problems(root):
        raise UserError(str(problem))


def problems(root: Path = Path()) -> list[Problem]:
    """Return what keeps DVC from working in the checkout `root`, the most basic first; nothing is changed."""
    if not (root / FOLDER).is_dir():
        return [Problem(f"{root.resolve()} is no checkout (it has no .dvc)", "run it in the checkout's root")]
    config = read_config(root)
    if isinstance(config, Problem):
        return [config]
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        return [Problem(f"DVC needs the user's name, and user {os.getuid()} has none", "set USER=<any name>")]
    local = "dvc config --local"
    tmp = root / FOLDER / "tmp"
    folders = {
        site_cache(config): (
            "core.site_cache_dir",
            f"set another folder: {local} core.site_cache_dir FOLDER",
        ),
        tmp: ("its temporary folder", "delete what is there, or make it writable"),
        cache(root, config): ("cache.dir", f"set another folder: {local} cache.dir FOLDER"),
    }
    found = [
        Problem(f"DVC cannot use {folder} ({what}): {reason}", advice)
        for folder, (what, advice) in folders.items()
        if (reason := _unusable(folder))
    ]
    if not _readable(tmp / RECORD):
        found.append(Problem(f"{tmp / RECORD}: left half written by a DVC that was killed", "delete it"))
    return found


def read_config(root: Path = Path()) -> "dict[str, Any] | Problem":
    """Return DVC's settings of system, user and checkout together, or why they cannot be read."""
    from dvc.config import Config, ConfigError

    unreadable = (ConfigError, OSError, UnicodeDecodeError)
    try:
        return dict(Config(dvc_dir=str(root / FOLDER)))
    except unreadable as error:
        reason, place = error, "its settings of the user or the system"
    for file in (root / FOLDER / "config", root / FOLDER / "config.local"):
        try:
            if file.exists():
                Config.validate(Config.load_file(str(file)))
        except unreadable as error:
            reason, place = error, str(file)
    why = " ".join(str(reason).split()).removeprefix("config file error: ")
    return Problem(f"DVC cannot read {place}: {why}", "correct them, or delete the file")


def site_cache(config: Mapping[str, Any]) -> Path:
    """Return the folder of what DVC keeps of all checkouts of a machine."""
    from dvc.dirs import site_cache_dir

    return Path(site_cache_dir(config["core"].get("site_cache_dir"))) / "repo"


def cache(root: Path, config: Mapping[str, Any]) -> Path:
    """Return the folder that keeps every version of the outputs."""
    return Path(config["cache"].get("dir") or root / FOLDER / "cache")


def mend_record(root: Path) -> None:
    """Remove DVC's record of who reads and writes what where it cannot be read.

    A DVC that is killed while it writes the record leaves it empty, and none reads it again until it is gone.
    Whoever writes it holds the guard: under it, a broken record is nobody's.
    """
    record = root / FOLDER / "tmp" / RECORD
    if _readable(record):
        return
    from dvc.lock import LockError, make_lock
    from dvc.rwlock import RWLOCK_LOCK

    config = read_config(root)
    hardlink = not isinstance(config, Problem) and config["core"].get("hardlink_lock", False)
    guard = make_lock(str(record.with_name(RWLOCK_LOCK)), tmp_dir=str(record.parent), hardlink_lock=hardlink)
    try:
        with guard:
            if not _readable(record):
                record.unlink(missing_ok=True)
    except (LockError, OSError):
        return  # `problems` tells of it


def _readable(record: Path) -> bool:
    """Whether DVC can read the record, or there is none."""
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        SCHEMA(json.loads(record.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError, Invalid):
        return False
    return True


def _unusable(folder: Path) -> str | None:
    """Return why no file can be made in `folder`, or None. A missing folder is made as DVC makes it."""
    before = os.umask(0)  # others share the site cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.umask(before)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return os.strerror(error.errno or 0)
