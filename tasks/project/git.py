"""git in a repository that others use too, such as flows, stages and a person at a terminal.

git's locks are files: who finds one fails at once. So whatever writes takes turns (`alone`), and where
somebody else's git holds a lock, the command is tried again for a while.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from dgpo_core.errors import InfrastructureError, UserError, without_credentials

TURN = "dgpo.lock"  # in git's common folder: one for all worktrees of a repository
TURN_PATIENCE = 300.0  # seconds until it is our turn; adding a worktree takes one
LOCK_PATIENCE = 15.0  # seconds for a lock of a git that is not ours
LOCKED = re.compile(
    r"Unable to create '(?P<file>.+?\.lock)': File exists"
    r"|could not lock config file (?P<config>.+?): File exists"
    r"|failed to read (?P<worktree>\S+/worktrees/\S+): "  # another git is making or removing that one
)


def git(*arguments: str | Path, cwd: Path) -> str:
    """Return what git prints.

    Raises UserError with what it says, and InfrastructureError where a lock stays for LOCK_PATIENCE seconds.
    """
    deadline, delay = time.monotonic() + LOCK_PATIENCE, 0.1
    while True:
        done = _run(cwd, *arguments)
        if done.returncode == 0:
            return done.stdout.strip()
        said = " ".join((done.stderr or done.stdout).split())
        locked = LOCKED.search(said)
        if locked is None:
            shown = f"git {' '.join(map(str, arguments))}: {said or f'exit code {done.returncode}'}"
            raise UserError(without_credentials(shown))
        if time.monotonic() > deadline:
            raise InfrastructureError(f"git {arguments[0]}: {_who_holds(locked, cwd)}")
        time.sleep(delay)
        delay = min(1.5 * delay, 2.0)


def ask(*arguments: str | Path, root: Path = Path(), timeout: float | None = None) -> str | None:
    """Return what git prints; None when it fails, is not there or takes longer than `timeout` seconds.

    For questions: git takes no lock for them, somebody may be working here.
    """
    with contextlib.suppress(OSError, UserError, subprocess.TimeoutExpired):
        done = _run(root, "--no-optional-locks", *arguments, timeout=timeout)
        return done.stdout if done.returncode == 0 else None
    return None


def head(root: Path = Path()) -> str:
    """Return the commit that is checked out; an empty string outside git."""
    return (ask("rev-parse", "HEAD", root=root) or "").strip()


def changed_files(
    *places: str | Path, root: Path = Path(), untracked: bool = False, timeout: float | None = None
) -> list[str] | None:
    """List the files among `places` (git's path patterns) that differ from the commit; None outside git.

    With `untracked` also those that no commit has and git does not ignore.
    """
    those = () if untracked else ("--untracked-files=no",)
    status = ask("status", "--porcelain", *those, "--", *(places or (".",)), root=root, timeout=timeout)
    return None if status is None else [line[3:] for line in status.splitlines()]


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Wait until no other thread or process of ours writes with git in the repository of `root`.

    Whoever is inside may enter again. Raises InfrastructureError after TURN_PATIENCE seconds.
    """
    folder = git("rev-parse", "--path-format=absolute", "--git-common-dir", cwd=root)
    path = Path(folder) / TURN
    try:
        turn = FileLock(path, is_singleton=True).acquire(timeout=TURN_PATIENCE)
    except Timeout:
        raise InfrastructureError(
            f"git: another run has held {path} for {TURN_PATIENCE:.0f} s: see what it waits for, or end it"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: runs need to write in git's folder") from error
    with turn:
        yield


def _run(cwd: Path, *arguments: str | Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    # In English, because LOCKED is; and never asking for a password, which nobody would see.
    environment = {**os.environ, "LC_ALL": "C", "LANGUAGE": "", "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(
            ["git", "-c", "core.quotePath=false", *map(str, arguments)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError:
        missing = "git is not installed" if cwd.is_dir() else "no such folder"
        raise UserError(f"{cwd}: {missing}") from None


def _who_holds(locked: re.Match[str], cwd: Path) -> str:
    """Say which lock is meant, and whether anybody can be holding it."""
    file = locked["file"] or (f"{locked['config']}.lock" if locked["config"] else locked["worktree"])
    path = (cwd / file).absolute()
    since = ""
    with contextlib.suppress(OSError):
        since = f" since {datetime.fromtimestamp(path.stat().st_mtime):%H:%M}"
    others = [
        f"process {process.pid}"
        for process in psutil.process_iter(["name"])
        if process.info["name"] == "git" and process.status() != psutil.STATUS_ZOMBIE
    ]
    if others:
        return f"{path} is there{since}; another git has it ({', '.join(others)}): wait for it"
    return (
        f"{path} is there{since}, and no git runs on this machine: one that was killed has left it; "
        "delete it unless an editor or another machine works in this repository"
    )
