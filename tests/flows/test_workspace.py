"""Worktrees of a real git and DVC repository."""

import contextlib
import fcntl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from dgpo_core.errors import InfrastructureError, UserError
from flows import workspace
from flows.workspace import (
    PUSH_VARIABLE,
    claim_name,
    one_at_a_time,
    open_workspace,
    project_root,
    publish,
    restore_outputs,
)
from tasks.project.git import changed_files
from tests.conftest import ROOT, commit_all, git


def dvc(*arguments: str, cwd: Path | None = None) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=cwd, check=True)


@pytest.fixture
def root(dvc_repository: Path) -> Path:
    """Make a project whose one stage was run."""
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    Path("dvc.yaml").write_text("stages:\n  a: {cmd: cp params.yaml a.txt, params: [seed], outs: [a.txt]}\n")
    Path(".gitignore").write_text("/.runs/\n/a.txt\n")
    dvc("repro", "-q")
    commit_all()
    return dvc_repository.resolve()


@pytest.fixture
def pushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do as `dgpo worker --push`."""
    monkeypatch.setenv(PUSH_VARIABLE, "1")


def test_a_branch_is_pushed_only_where_that_was_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path.parent / f"{tmp_path.name}-origin.git"
    git("init", "-q", "--bare", str(origin))
    git("remote", "add", "origin", str(origin))
    made = open_workspace(root, "quiet")
    branches = ("--git-dir", str(origin), "branch", "--list")
    for setting in (None, "0"):
        if setting:
            monkeypatch.setenv(PUSH_VARIABLE, setting)
        publish(made, [])
        assert not git(*branches)
    monkeypatch.setenv(PUSH_VARIABLE, "1")
    publish(made, [])
    assert git(*branches) == "runs/quiet"


def test_a_run_has_files_branch_and_the_shared_cache(root: Path) -> None:
    made = open_workspace(root, "calm-otter")
    assert made.tree == root / ".runs" / "calm-otter" and made.branch == "runs/calm-otter"
    assert not (made.tree / "a.txt").exists()
    restore_outputs(made.tree)
    assert (made.tree / "a.txt").read_text() == (root / "a.txt").read_text()  # nothing was run

    params = yaml.safe_load((root / "params.yaml").read_text())
    made.write_params({**params, "seed": 7}, "Written by a test")
    dvc("repro", "-q", cwd=made.tree)
    commit = made.save("seed 7")
    assert commit == git("rev-parse", "runs/calm-otter") != git("rev-parse", "HEAD")
    assert git("show", "--stat", "--format=%an: %s", commit).startswith("dgpo pipeline: seed 7")
    assert set(git("diff", "--name-only", "HEAD", commit).split()) == {"params.yaml", "dvc.lock"}
    assert changed_files(root=root) == []
    made.remove()
    assert not made.tree.exists()
    # what it made is in the cache of the checkout
    git("checkout", "-q", "runs/calm-otter")
    restore_outputs(root)
    assert "seed: 7" in (root / "a.txt").read_text()


def test_a_run_that_starts_again_finds_what_it_left(root: Path) -> None:
    made = open_workspace(root, "calm-otter")
    (made.tree / ".state").mkdir()
    (made.tree / ".state" / "checkpoint").write_text("half done")
    (made.tree / "params.yaml").write_text("changed: true\n")
    again = open_workspace(root, "calm-otter")
    assert again == made
    assert (made.tree / ".state" / "checkpoint").read_text() == "half done"
    assert (made.tree / "params.yaml").read_text() == "changed: true\n"


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("calm-otter", "calm-otter"),
        ("beta 0.01 / täglich", "beta-0.01-t-glich"),
        ("../../etc", "etc"),
        ("a..b.lock", "a.b"),
        ("...", "run"),
        ("-rf", "rf"),
    ],
)
def test_any_name_that_people_type_is_a_branch_and_a_folder(root: Path, given: str, plain: str) -> None:
    assert claim_name(root, given, "11111111-0") == plain
    assert claim_name(root, given, "11111111-0") == plain  # the same run, started again
    assert claim_name(root, given, "22222222-0") == f"{plain}-22222222"
    made = open_workspace(root, plain)
    assert made.tree.parent == root / ".runs" and made.branch == f"runs/{plain}"


def test_a_run_that_made_nothing_leaves_nothing(root: Path) -> None:
    name = claim_name(root, "refused", "11111111-0")
    made = open_workspace(root, name)
    made.discard()
    assert not made.tree.exists() and "refused" not in git("branch", "--list", "runs/*")
    assert claim_name(root, "refused", "22222222-0") == "refused"  # the name is free again

    kept = open_workspace(root, "kept")
    (kept.tree / "params.yaml").write_text("changed: true\n")
    kept.save("of an earlier attempt")
    kept.discard()
    assert not kept.tree.exists() and "kept" in git("branch", "--list", "runs/*")


def test_messages_name_no_password(root: Path, pushing: None) -> None:
    git("remote", "add", "origin", "https://me:" + "secret@localhost:1/x.git")
    with pytest.raises(InfrastructureError) as caught:
        publish(open_workspace(root, "remote"), [])
    assert "localhost:1" in str(caught.value) and "secret" not in str(caught.value)


def test_nothing_to_commit_commits_nothing(root: Path) -> None:
    made = open_workspace(root, "idle")
    assert made.save("nothing") == made.commit == git("rev-parse", "HEAD")


def test_unchanged_params_keep_their_comments(root: Path) -> None:
    made = open_workspace(root, "same")
    text = (made.tree / "params.yaml").read_text()
    made.write_params(yaml.safe_load(text), "other words")
    assert (made.tree / "params.yaml").read_text() == text
    with pytest.raises(UserError, match=r"reinforce\.betta: unknown key .*, did you mean reinforce\.beta\?"):
        made.write_params({"profile": "x", "reinforce": {"betta": 1}}, "wrong")


def test_bad_revision_and_bad_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no-such-branch"):
        open_workspace(root, "x", "no-such-branch")
    assert project_root() == root
    monkeypatch.setenv("DGPO_ROOT", str(root / ".dvc"))
    with pytest.raises(UserError, match=r"no dvc\.yaml; start the worker in the project"):
        project_root()


def test_credentials_come_along_and_stay_private(root: Path) -> None:
    dvc("remote", "add", "--local", "far", "s3://bucket")
    made = open_workspace(root, "remote")
    local = made.tree / ".dvc" / "config.local"
    assert "s3://bucket" in local.read_text() and local.stat().st_mode & 0o077 == 0
    assert not git("status", "--porcelain", cwd=made.tree)


def test_a_remote_beside_the_checkout_is_the_same_one(root: Path) -> None:
    dvc("remote", "add", "-d", "folder", "../beside")
    git("commit", "-qam", "a remote")
    made = open_workspace(root, "pushing")
    publish(made, ["a"])
    assert list((root.parent / "beside").rglob("*"))
    assert not (made.tree.parent / "beside").exists()


@pytest.mark.thorough
def test_a_remote_that_does_not_answer_may_answer_later(root: Path, tmp_path: Path, pushing: None) -> None:
    made = open_workspace(root, "offline")
    publish(made, ["a"])  # neither git nor DVC knows any other place: nothing to do
    git("remote", "add", "origin", str(tmp_path / "nowhere"))
    with pytest.raises(InfrastructureError, match="cannot publish runs/offline"):
        publish(made, [])


@pytest.mark.thorough
def test_who_waited_and_who_comes_later_take_turns(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one who waits has opened the file that the first one removes; the third finds none."""
    about_to_lock, inside, leave, third = (threading.Event() for _ in range(4))
    flock = fcntl.flock

    def announced(file: int, operation: int) -> None:
        about_to_lock.set()
        flock(file, operation)

    def wait_and_stay() -> None:
        with one_at_a_time(root, "thrice"):
            inside.set()
            leave.wait(10)

    def come_later() -> None:
        with one_at_a_time(root, "thrice"):
            third.set()

    threads = [threading.Thread(target=work, daemon=True) for work in (wait_and_stay, come_later)]
    with one_at_a_time(root, "thrice"):
        monkeypatch.setattr(fcntl, "flock", announced)
        threads[0].start()
        assert about_to_lock.wait(10)
    assert inside.wait(10)
    threads[1].start()
    assert not third.wait(0.3), "two were inside"
    leave.set()
    assert third.wait(10)
    for thread in threads:
        thread.join(10)
    assert not list((root / workspace.RUNS).iterdir())
    assert "another process works in .runs/thrice: waiting" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_crowd_takes_turns(root: Path) -> None:
    counts: list[int] = []
    within: set[int] = set()

    def come_and_go() -> None:
        for _ in range(50):
            with one_at_a_time(root, "crowd"):
                within.add(threading.get_ident())
                time.sleep(0)  # lets others run
                counts.append(len(within))
                within.remove(threading.get_ident())

    threads = [threading.Thread(target=come_and_go, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counts == [1] * 300


def test_a_failed_run_leaves_no_lock(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), one_at_a_time(root, "failing"):
        print(1 / 0)
    assert not list((root / workspace.RUNS).iterdir())


@pytest.mark.thorough
def test_runs_that_start_together_all_start(root: Path) -> None:
    """Another git, such as an editor's, has its locks now and then; the runs' own take turns."""
    lock, stop = root / ".git" / "config.lock", threading.Event()

    def disturb() -> None:
        while not stop.wait(0.05):
            with contextlib.suppress(FileExistsError):
                lock.touch(exist_ok=False)
                stop.wait(0.05)
                lock.unlink()

    def start(number: int) -> str:
        name = claim_name(root, "together", f"{number:08}-0")
        open_workspace(root, name)
        return name

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            names = list(pool.map(start, range(4)))
    finally:
        stop.set()
        disturber.join()
    assert len(set(names)) == 4
    assert len(git("worktree", "list").splitlines()) == 5
