"""git's locks between processes, in a real repository."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from dgpo_core.errors import InfrastructureError, UserError
from tasks.project import git as module
from tasks.project.git import TURN, alone, ask, changed_files, git, head

WHO = ("-c", "user.name=t", "-c", "user.email=t@example.org")


@pytest.fixture
def repository(workplace: Path) -> Path:
    git("init", "-q", cwd=workplace)
    git(*WHO, "commit", "-q", "--allow-empty", "-m", "first", cwd=workplace)
    return workplace


CHANGES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "config": ("config.lock", lambda root: git("config", "a.b", "1", cwd=root)),
    "index": ("index.lock", lambda root: git("add", "--update", cwd=root)),
    "branch": ("refs/heads/x.lock", lambda root: git("branch", "x", cwd=root)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_lock_that_goes_away_is_waited_for(repository: Path, change: str) -> None:
    name, work = CHANGES[change]
    lock = repository / ".git" / name
    lock.touch()
    threading.Timer(0.5, lock.unlink).start()
    work(repository)


@pytest.mark.parametrize("change", CHANGES)
def test_a_lock_that_stays_is_named_and_no_fault_of_the_user(
    repository: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.2)
    name, work = CHANGES[change]
    lock = repository / ".git" / name
    lock.touch()
    with pytest.raises(InfrastructureError) as caught:
        work(repository)
    assert f"{lock} is there since {time.strftime('%H:')}" in str(caught.value)
    lock.unlink()
    work(repository)


def test_a_lock_of_the_dead_and_one_of_the_living_are_told_apart(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.0)
    monkeypatch.setattr(psutil, "process_iter", lambda _names: [])
    (repository / ".git" / "index.lock").touch()
    with pytest.raises(InfrastructureError, match="one that was killed has left it; delete it"):
        git("add", "--update", cwd=repository)
    monkeypatch.undo()
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.0)
    # a git that lives: it waits for objects' names on its standard input
    with subprocess.Popen(
        ["git", "cat-file", "--batch"], cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        with pytest.raises(InfrastructureError, match=rf"another git has it \(.*process {other.pid}"):
            git("add", "--update", cwd=repository)
        other.terminate()


def test_messages_are_understood_in_any_language(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setattr(module, "LOCK_PATIENCE", 0.0)
    (repository / ".git" / "index.lock").touch()
    with pytest.raises(InfrastructureError):
        git("add", "--update", cwd=repository)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rev-parse", "--verify", "no-such-branch"), "Needed a single revision"),
        (("branch", "runs/x"), "'refs/heads/runs' exists; cannot create 'refs/heads/runs/x'"),
        (("config", "no-section", "1"), "does not contain a section"),
    ],
)
def test_what_the_user_can_mend_is_the_users(repository: Path, arguments: tuple[str, ...], said: str) -> None:
    git("branch", "runs", cwd=repository)
    with pytest.raises(UserError, match=said):
        git(*arguments, cwd=repository)


def test_outside_of_git(workplace: Path) -> None:
    with pytest.raises(UserError, match="not a git repository"), alone(workplace):
        pass
    with pytest.raises(UserError, match="no such folder"):
        git("status", cwd=workplace / "nowhere")
    assert ask("rev-parse", "HEAD", root=workplace) is None
    assert (head(), changed_files()) == ("", None)


def test_the_state_of_a_checkout(repository: Path) -> None:
    for name in ("dvc.lock", "params.yaml"):
        Path(name).write_text("1")
    git("add", ".", cwd=repository)
    git(*WHO, "commit", "-qm", "second", cwd=repository)
    assert head() == git("rev-parse", "HEAD", cwd=repository)
    assert changed_files() == []
    for name in ("dvc.lock", "params.yaml", "new"):
        Path(name).write_text("2")
    assert changed_files() == ["dvc.lock", "params.yaml"]
    assert changed_files(".", ":(exclude)dvc.lock", untracked=True) == ["params.yaml", "new"]


def test_threads_and_processes_take_turns_and_may_enter_twice(repository: Path) -> None:
    order: list[str] = []

    def second() -> None:
        with alone(repository):
            order.append("thread")

    code = "from pathlib import Path; from tasks.project.git import alone\nwith alone(Path()): print('in')"
    thread = threading.Thread(target=second)
    with alone(repository), alone(repository):
        thread.start()
        process = subprocess.Popen([sys.executable, "-c", code], cwd=repository)
        time.sleep(1.5)
        order.append("first")
        assert process.poll() is None
    thread.join(10)
    assert process.wait(10) == 0
    assert order == ["first", "thread"]


def test_a_worktree_takes_turns_with_its_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURN_PATIENCE", 0.2)
    git("worktree", "add", "-q", "tree", cwd=repository)
    failed = []

    def other() -> None:
        try:
            with alone(repository / "tree"):
                pass
        except InfrastructureError as error:
            failed.append(str(error))

    with alone(repository):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert str(repository / ".git" / TURN) in failed[0]


def test_questions_take_no_lock(repository: Path) -> None:
    """A commit that somebody makes meanwhile would find the lock of a status."""
    (repository / ".git" / "index.lock").touch()
    (repository / "a").write_text("a")
    assert ask("status", "--porcelain", root=repository) == "?? a\n"
