"""DVC as it is in a checkout: what it has recorded and kept, what it needs to work, and who works with it.

dvc.lock and the cache are read as files, while DVC may hold its locks. What DVC needs besides the project
(settings that can be read, folders in which it can write) is looked at before DVC starts: it answers with a
traceback, or only when a stage has run for hours and its outputs cannot be kept. Who holds its locks is said
in place of DVC's advice to delete them.
"""

import contextlib
import getpass
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import reduce
from operator import getitem
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import psutil
from pydantic import AfterValidator, Field

from dgpo_core.config.yaml_text import parse
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json, put, read_json
from dgpo_core.temporary import temporary_folder

LOCK = Path("dvc.lock")
IGNORED = "__pycache__"  # by .dvcignore, and the only such thing inside of what stages depend on
ATTEMPTS = 5  # to read the lock while a DVC beside us rewrites it


@dataclass(frozen=True)
class LockedStage:
    """A stage's last run: DVC's md5 of what it read and wrote, by path, and its parameters."""

    cmd: str
    deps: dict[str, str]
    outs: dict[str, str]
    params: dict[str, Any]

    def param(self, key: str) -> Any:
        """Return a value by its dotted key; it or one of its sections was recorded. Raise KeyError."""
        sections = key.split(".")
        for length in range(len(sections), 0, -1):
            if (name := ".".join(sections[:length])) in self.params:
                return reduce(getitem, sections[length:], self.params[name])
        raise KeyError(key)


Lock = Mapping[str, LockedStage]


def read_lock(root: Path = Path()) -> dict[str, LockedStage]:
    """Return every stage that has run, by name. Raise UserError for a broken file."""
    path = root / LOCK
    if not path.is_file():
        return {}
    problem: object = "no stages"
    for attempt in range(ATTEMPTS):
        time.sleep(0.1 * attempt)
        try:
            return parse_lock(path.read_text(encoding="utf-8"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = " ".join(str(error).split())
    raise UserError(f"{path}: not a lock file of DVC: {problem}; restore it with git, or delete it")


def parse_lock(text: str) -> dict[str, LockedStage]:
    """Read the text of a lock file. Raise ValueError, KeyError, TypeError or AttributeError."""
    return {name: _stage(entry) for name, entry in parse(text)["stages"].items()}


def _stage(entry: Mapping[str, Any]) -> LockedStage:
    deps = {dep["path"]: dep["md5"] for dep in entry.get("deps", [])}
    outs = {out["path"]: out["md5"] for out in entry.get("outs", [])}
    params = {key: value for file in entry.get("params", {}).values() for key, value in file.items()}
    return LockedStage(entry["cmd"], deps, outs, params)


def maker(lock: Lock, path: str) -> str | None:
    """Name the stage that writes `path`."""
    return next((name for name, stage in lock.items() if path in stage.outs), None)


def upstream(lock: Lock, paths: Iterable[str]) -> dict[str, LockedStage]:
    """Return the stages that make `paths` and all that those need, each after its own upstream stages."""
    found: dict[str, LockedStage] = {}
    for path in paths:
        name = maker(lock, path)
        if name and name not in found:
            found |= {
                key: value for key, value in upstream(lock, lock[name].deps).items() if key not in found
            }
            found[name] = lock[name]
    return found


def dvc_md5(path: Path) -> str | None:
    """Compute DVC's md5 of a file or folder, as dvc.lock has it; None where there is none."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    if not path.is_dir():
        return None
    files = [
        file for file in path.rglob("*") if file.is_file() and IGNORED not in file.relative_to(path).parts
    ]
    entries = [{"md5": dvc_md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing = json.dumps(sorted(entries, key=lambda entry: str(entry["relpath"])), sort_keys=True)
    return hashlib.md5(listing.encode()).hexdigest() + ".dir"


def cache_folder() -> Path | None:
    """Find DVC's cache, which worktrees share; None where there is no project of DVC."""
    command = [sys.executable, "-m", "dvc", "cache", "dir"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else Path(done.stdout.strip())


def _inside(name: str) -> str:
    """Return the path of a file in a folder. Raise ValueError for one that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or not name.isprintable():
        raise ValueError(f"{name!a:.80} is no path inside a folder")
    return name


@dataclass(frozen=True)
class _Entry:
    """A file of a folder in DVC's cache."""

    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    relpath: Annotated[str, AfterValidator(_inside)]


def from_cache(md5: str, folder: Path) -> bool:
    """Write the folder that DVC keeps under `md5` to `folder`; False when its cache lacks some of it.

    Raises UserError for a damaged list of its files, and one that leads out of the folder.
    """
    if (cache := cache_folder()) is None:
        return False

    def kept(digest: str) -> Path:
        return cache / "files" / "md5" / digest[:2] / digest[2:]

    if not kept(md5).is_file():
        return False
    entries = read_json(kept(md5), list[_Entry], "DVC's list of a folder's files")
    sources = {entry.relpath: kept(entry.md5) for entry in entries}
    if not all(source.is_file() for source in sources.values()):
        return False
    with temporary_folder("cache", folder.parent) as temporary:  # several processes may ask for it at once
        (temporary / folder.name).mkdir()
        for name, source in sources.items():
            copy = temporary / folder.name / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        put(temporary / folder.name, folder)
    return True


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
    from dvc.dirs import site_cache_dir

    another, tmp = "set another folder: dvc config --local", root / FOLDER / "tmp"
    machine = Path(site_cache_dir(config["core"].get("site_cache_dir"))) / "repo"  # of all its checkouts
    versions = Path(config["cache"].get("dir") or root / FOLDER / "cache")  # of the outputs
    folders = {
        machine: ("core.site_cache_dir", f"{another} core.site_cache_dir FOLDER"),
        tmp: ("its temporary folder", "delete what is there, or make it writable"),
        versions: ("cache.dir", f"{another} cache.dir FOLDER"),
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
    """Tell whether DVC can read the record, or there is none."""
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        SCHEMA(parsed_json(record.read_bytes()))
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
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return os.strerror(error.errno or 0)
    finally:
        os.umask(before)


BUSY = "another run is at work here"  # how the sentence begins


class LockFilter(logging.Filter):
    """Keep what DVC logs of a lock that another process holds from the terminal, and remember it."""

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


def refuse_second(root: Path = Path()) -> None:
    """Raise UserError where another process executes a stage of the checkout `root`."""
    if _holders(root / FOLDER / "tmp", reading=False):
        raise UserError(at_work(root))


def at_work(root: Path = Path()) -> str:
    """Say which other process works in the checkout `root`, at which stage and since when, if known."""
    for pid in _holders(root / FOLDER / "tmp"):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            stage, since = _stage_of(process)
            where = f", at {stage} since {datetime.fromtimestamp(since):%H:%M}" if stage else ""
            return (
                f"{BUSY}{where} (process {pid}): wait for it or end it; beside it run `dvc exp run --temp`, "
                "or from the dashboard"
            )
    return f"{BUSY}, or was a moment ago: try again"


def _holders(folder: Path, reading: bool = True) -> list[int]:
    """Find living processes that hold a lock to write some paths; with `reading`, any of DVC's locks."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        record = parsed_json((folder / RECORD).read_bytes())
        found += [holder["pid"] for holder in record.get("write", {}).values()]
        if reading:
            found += [holder["pid"] for holders in record.get("read", {}).values() for holder in holders]
    with contextlib.suppress(OSError):
        if reading:
            found += [int(number) for number in re.findall(r"\d+", (folder / "lock").read_text())[:1]]
    return [pid for pid in dict.fromkeys(found) if pid != os.getpid() and psutil.pid_exists(pid)]


def _stage_of(process: psutil.Process) -> tuple[str | None, float]:
    """Return (stage that DVC's process has started, when), or None and when it was started itself."""
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if name := child.environ().get("DVC_STAGE"):
                return name, child.create_time()
    return None, process.create_time()
