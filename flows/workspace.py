"""A git worktree for each run, with the project's DVC cache: runs do not disturb each other or a user.

A run called `calm-otter` works in `.runs/calm-otter` on the branch `runs/calm-otter`. A killed run that
starts again finds its worktree and continues in it.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dgpo_core.config.params import PARAMS, read_yaml, validated
from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import InfrastructureError, UserError, without_credentials
from dgpo_core.files import write_text
from tasks.project.dvc import BUSY
from tasks.project.git import alone, ask, git
from tasks.project.servers import adopt
from tasks.tracking.store import tracking_uri

RUNS = Path(".runs")
BRANCHES = "runs"
REMOTE = "origin"  # git's, for workers with clones of their own
ROOT_VARIABLE = "DGPO_ROOT"
PUSH_VARIABLE = "DGPO_PUSH"  # 1: branches of runs are pushed; `dgpo worker --push`
DVC = (sys.executable, "-m", "dvc")
# What DVC says when another process holds one of its locks; trying again is the cure.
LOCK_MESSAGES = (BUSY, "Unable to acquire lock", "it is being blocked by", "RWLock-file")
# for commits of machines whose git has no identity
IDENTITY = {"name": "dgpo pipeline", "email": "pipeline@localhost"}


def project_root() -> Path:
    """Return the checkout that a worker serves: $DGPO_ROOT, or the working directory."""
    root = Path(os.environ.get(ROOT_VARIABLE) or ".").resolve()
    if not (root / "dvc.yaml").is_file():
        raise UserError(f"{root}: no dvc.yaml; start the worker in the project, or set {ROOT_VARIABLE}")
    return root


def enter_project() -> Path:
    """Work in the project, with the MLflow store of those who work there by hand.

    A worker starts runs in temporary folders; MLflow's default store and `dgpo up`'s records are relative.
    """
    root = project_root()
    os.chdir(root)
    adopt()
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri())
    return root


def dvc(*arguments: str, cwd: Path) -> str:
    """Return what DVC prints.

    Raises UserError with what it says, and InfrastructureError where another DVC holds a lock.
    """
    done = subprocess.run([*DVC, *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        kind = InfrastructureError if any(text in said for text in LOCK_MESSAGES) else UserError
        raise kind(without_credentials(f"dvc {' '.join(arguments)}: {said}"))
    return done.stdout.strip()


@dataclass(frozen=True)
class Workspace:
    """A worktree of `root` at `commit`; `branch` is None where nothing is to be committed."""

    root: Path
    tree: Path
    commit: str
    branch: str | None

    def write_params(self, params: Mapping[str, Any], comment: str) -> None:
        """Replace params.yaml. Raises UserError for parameters that there are not."""
        validated(dict(params))
        path = self.tree / PARAMS
        if not path.is_file() or read_yaml(path) != params:
            write_text(path, f"# {comment}\n{as_text(dict(params))}")

    def save(self, message: str) -> str:
        """Commit what the run has changed (params.yaml, dvc.lock, base models); return its commit."""
        assert self.branch, "a workspace without a branch commits nothing"
        with alone(self.root):  # stages that run side by side come here too
            git("add", "--update", cwd=self.tree)
            if (self.tree / "dvc.lock").is_file():
                git("add", "dvc.lock", cwd=self.tree)
            if git("diff", "--cached", "--name-only", cwd=self.tree):
                git(*_identity(self.tree), "commit", "--no-verify", "-qm", message, cwd=self.tree)
            return git("rev-parse", "HEAD", cwd=self.tree)

    def remove(self) -> None:
        """Remove the worktree; its branch, the DVC cache and MLflow keep what it has made."""
        remove_worktree(self.root, self.tree)

    def discard(self) -> None:
        """Remove the worktree, and its branch unless an earlier attempt has committed something on it."""
        with alone(self.root):
            self.remove()
            if self.branch and git("rev-parse", self.branch, cwd=self.root) == self.commit:
                git("branch", "-D", self.branch, cwd=self.root)  # with its section in git's configuration


def plain_name(name: str) -> str:
    """Make a name for a worktree and its branch, as git and file systems take it."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "run"
    return plain.replace("..", ".").removesuffix(".lock")


def claim_name(root: Path, run_name: str, run_id: str) -> str:
    """Claim the name of a run's worktree and branch: the run's own, made plain.

    People may give two runs the same name; the second one gets a part of its id too. The same run has the
    same name whenever it starts again.
    """
    plain = plain_name(run_name)
    with alone(root):  # or two runs would both find the name free
        for name in (plain, f"{plain}-{run_id[:8]}"):
            key = f"branch.{BRANCHES}/{name}.dgpo-run"
            owner = (ask("config", "--get", key, root=root) or "").strip()
            if not owner:
                git("config", key, run_id, cwd=root)
            if owner in ("", run_id):
                return name
    raise UserError(f"{run_name}: two runs of this name with the same id: {run_id}")


def open_workspace(root: Path, name: str, revision: str = "HEAD", *, keep_lock: bool = False) -> Workspace:
    """Open the worktree of run `name` on its branch, as it was left when there is one.

    `keep_lock`: for a worktree that is used again and again, without a branch (`flows.reproduce`): code and
    settings are those of `revision`, and dvc.lock says what the worktree has already made.
    """
    tree = root / RUNS / name
    branch = None if keep_lock else f"{BRANCHES}/{name}"
    commit = git("rev-parse", f"{revision}^{{commit}}", cwd=root)
    if tree.exists() and keep_lock:
        lock = (tree / "dvc.lock").read_text() if (tree / "dvc.lock").is_file() else None
        with alone(root):
            git("checkout", "--force", "--detach", commit, cwd=tree)
        if lock:
            (tree / "dvc.lock").write_text(lock)
    elif not tree.exists():
        add_worktree(root, tree, commit, branch)
    share_cache(root, tree)
    return Workspace(root, tree, commit, branch)


def add_worktree(root: Path, tree: Path, commit: str, branch: str | None = None) -> None:
    """Check `commit` out in the new folder `tree`: on `branch`, which is set to it, or on none."""
    how = ("-B", branch) if branch else ("--detach",)
    with alone(root):
        git("worktree", "prune", cwd=root)  # the record of one whose folder somebody has deleted
        git("worktree", "add", *how, tree, commit, cwd=root)


def remove_worktree(root: Path, tree: Path) -> None:
    """Delete the folder and git's record of it."""
    with alone(root):
        git("worktree", "remove", "--force", tree, cwd=root)


@contextlib.contextmanager
def one_at_a_time(root: Path, name: str) -> Iterator[None]:
    """Wait until no other process of this machine works for the run.

    A run that was taken for dead and started again may be alive: two must not write into one worktree.
    """
    path = root / RUNS / f"{name}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process works in {RUNS / name}: waiting until it ends", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held
        lock.release()


def share_cache(root: Path, tree: Path) -> None:
    """Give `tree` the DVC cache and the local configuration (remotes, credentials) of `root`."""
    from dvc.repo import Repo

    local = root / ".dvc" / "config.local"
    if local.is_file():
        (tree / ".dvc" / "config.local").write_bytes(local.read_bytes())
        (tree / ".dvc" / "config.local").chmod(0o600)
    with Repo(str(root)) as repo:
        cache = repo.cache.local_cache_dir
        name = repo.config["core"].get("remote")
        remote = repo.cloud.get_remote() if name else None
        folder = str(remote.path) if remote and remote.fs.protocol == "local" else None
    with Repo(str(tree)) as repo, repo.config.edit("local") as config:
        config["cache"]["dir"] = str(cache)
        if folder:  # its path may be relative to the checkout
            config["remote"].setdefault(name, {})["url"] = folder


def restore_outputs(tree: Path) -> None:
    """Bring what dvc.lock names into the worktree, as far as the cache has it."""
    dvc("checkout", "--force", "--allow-missing", "--quiet", cwd=tree)


def has_remote(root: Path) -> bool:
    """Tell whether other clones can be reached through git."""
    return REMOTE in git("remote", cwd=root).split()


def has_storage(root: Path) -> bool:
    """Tell whether DVC has a default remote."""
    with contextlib.suppress(UserError):  # DVC's answer where there is none
        return bool(dvc("config", "core.remote", cwd=root))
    return False


def may_push() -> bool:
    """Tell whether whoever started the worker lets runs push to git's remote."""
    return os.environ.get(PUSH_VARIABLE, "").lower() in ("1", "true", "yes", "on")


def publish(workspace: Workspace, stages: list[str]) -> None:
    """Make the branch, if it may be pushed, and these stages' outputs available to other clones.

    Raises InfrastructureError: a remote that does not answer now may answer later.
    """
    assert workspace.branch
    try:
        if may_push() and has_remote(workspace.root):
            git("push", "--force", REMOTE, workspace.branch, cwd=workspace.tree)
        if stages and has_storage(workspace.tree):
            dvc("push", "--quiet", *stages, cwd=workspace.tree)
    except (UserError, InfrastructureError) as error:
        raise InfrastructureError(f"cannot publish {workspace.branch}: {error}") from error


def _identity(tree: Path) -> list[str]:
    if (ask("config", "user.email", root=tree) or "").strip():
        return []
    return [part for key, value in IDENTITY.items() for part in ("-c", f"user.{key}={value}")]
