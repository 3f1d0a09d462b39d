"""DVC's remote and experiments on a miniature pipeline, with this repository's own settings."""

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos import unshares
from dgpo_core.files import remove
from tasks.commands.experiments import changes, rows
from tests.conftest import ROOT, commit_all, make_workplace

STAGE = """
import json, pathlib, yaml
beta = yaml.safe_load(open("params.yaml"))["reinforce"]["beta"]
pathlib.Path("models").mkdir(exist_ok=True)
pathlib.Path("models/dgpo").write_text(str(beta))
pathlib.Path("metrics").mkdir(exist_ok=True)
metrics = {"average": 1 - beta, "onehop": beta, "failed": 0}
pathlib.Path("metrics/evaluate-dgpo.json").write_text(json.dumps(metrics))
"""
GRAPH = """
stages:
  reinforce:
    cmd: exec python work.py
    params: [reinforce]
    deps: [work.py]
    outs: [models/dgpo]
    metrics: [metrics/evaluate-dgpo.json]
"""


def run(place: Path, *command: str, fails: bool = False) -> str:
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=600)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(place: Path, *arguments: str) -> str:
    return run(place, sys.executable, "-m", "dvc", *arguments)


def remote(place: Path, *action: str, fails: bool = False) -> str:
    return run(place, sys.executable, "-m", "tasks.commands.cli", *action, fails=fails)


def set_beta(place: Path, beta: float) -> None:
    (place / "params.yaml").write_text(f"seed: 0\nreinforce:\n  beta: {beta}\n  steps: 40\n")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Iterator[Path]:
    """A clone that has run its pipeline with two values of a parameter, and committed the second."""
    folder = tmp_path_factory.mktemp("clones")
    place = folder / "first"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        for variable in ("AUTHOR", "COMMITTER"):  # DVC commits experiments
            patch.setenv(f"GIT_{variable}_NAME", "a")
            patch.setenv(f"GIT_{variable}_EMAIL", "a@example.org")
        run(place, "git", "init", "-q")
        dvc(place, "init", "-q")
        shutil.copy(ROOT / ".dvc" / "config", place / ".dvc" / "config")
        (place / "dvc.yaml").write_text(GRAPH)
        (place / "work.py").write_text(STAGE)
        (place / ".gitignore").write_text("/models/\n/metrics/\n__pycache__/\n")
        for beta in (0.5, 0.25):
            set_beta(place, beta)
            dvc(place, "repro")
        commit_all("base", cwd=place)
        yield place


@pytest.mark.thorough
def test_a_second_clone_pulls_and_has_nothing_to_do(first: Path) -> None:
    second = first.parent / "second"
    run(first, "git", "clone", "-q", ".", str(second))
    message = remote(second, "pull", fails=True)
    assert message.count("\n") == 1
    assert f"{first.parent / 'dgpo-remote'}: nothing was pushed" in message
    assert "pushed to" in remote(first, "push", "--history")

    remote(second, "pull")
    assert (second / "models/dgpo").read_text() == "0.25"
    assert "up to date" in dvc(second, "status")
    assert "didn't change, skipping" in dvc(second, "repro")

    set_beta(second, 0.5)  # what the first clone ran once; its outputs are fetched when they are needed
    assert "is cached - skipping run" in dvc(second, "repro", "--pull")
    assert (second / "models/dgpo").read_text() == "0.5"
    set_beta(second, 0.25)
    assert "is cached - skipping run" in dvc(second, "repro")


def digests(folder: Path) -> set[str]:
    """Read every object of a cache or remote; the names are the MD5 of what is in it.

    What DVC was writing when there was no more room is none: it stays there as `.<something>.tmp`.
    """
    found = [path for path in (folder / "files/md5").rglob("[!.]*") if path.is_file()]
    for path in found:
        name = path.parent.name + path.name
        assert hashlib.md5(path.read_bytes()).hexdigest() == name.removesuffix(".dir"), path
    return {path.parent.name + path.name for path in found}


def clone(first: Path, name: str) -> Path:
    """Clone `first` without its stages; the DVC remote is the folder `shared` beside the clones."""
    made = first.parent / name
    run(first, "git", "clone", "-q", ".", str(made))
    for file in ("dvc.yaml", "dvc.lock"):
        (made / file).unlink()
    dvc(made, "remote", "add", "--local", "--default", "shared", str(first.parent / "shared"))
    return made


LARGE = 64 << 20  # bytes


@pytest.mark.thorough
def test_two_clones_push_at_once(first: Path) -> None:
    """One file is in both, so that both send the same object; each also has one of its own."""
    places = [clone(first, f"clone-{number}") for number in range(2)]
    for place in places:
        (place / "large").write_bytes(bytes(LARGE))
        (place / "own").write_text(place.name)
        dvc(place, "add", "-q", "large", "own")
    command = [sys.executable, "-m", "tasks.commands.cli", "push"]
    pushes = [subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL) for place in places]
    assert [push.wait(600) for push in pushes] == [0, 0]
    shared = first.parent / "shared"
    objects = digests(shared)
    assert all(objects >= digests(place / ".dvc/cache") for place in places)
    assert not list(shared.rglob("*.tmp"))
    for place in places:  # and what was pushed comes back
        for path in (place / ".dvc/cache", place / "large", place / "own"):
            remove(path)
        dvc(place, "pull", "-q", "large", "own")
        assert (place / "own").read_text() == place.name and (place / "large").read_bytes() == bytes(LARGE)


@pytest.mark.thorough
@pytest.mark.skipif(not unshares(), reason="a small file system needs the right to mount one")
def test_a_full_remote_is_named_and_filled_later(first: Path) -> None:
    """The remote has room for some of what is pushed: no object is half-written, and a later push ends it."""
    place = clone(first, "full")
    shared = first.parent / "small"
    shared.mkdir()
    dvc(place, "remote", "modify", "--local", "shared", "url", str(shared))
    (place / "large").write_bytes(bytes(LARGE))
    dvc(place, "add", "-q", "large")
    push = shlex.join([sys.executable, "-m", "tasks.commands.cli", "push"])
    kept = Path(f"{shared}-kept")  # the mount ends with its process
    script = f"mount -t tmpfs -o size=32m tmpfs {shared}; {push}; code=$?; cp -r {shared} {kept}; exit $code"
    message = run(place, "unshare", "--mount", "sh", "-c", script, fails=True)
    assert "No space left on device" in message and "Traceback" not in message
    everything = digests(place / ".dvc/cache")
    assert digests(kept) < everything
    remote(place, "push")
    assert digests(shared) == everything


def test_no_remote_is_said_in_one_line(first: Path) -> None:
    bare = first.parent / "bare"
    run(first, "git", "clone", "-q", ".", str(bare))
    dvc(bare, "config", "--unset", "core.remote")
    message = remote(bare, "pull", fails=True)
    assert "no remote specified" in message and message.count("\n") == 1


@pytest.mark.thorough
def test_experiments_compare_in_few_columns(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As README says, also in a workspace of DVC's own, with what `dgpo experiments` prints."""
    dvc(first, "exp", "run", "--temp", "-n", "low", "-S", "reinforce.beta=0.125")
    assert (first / "models/dgpo").read_text() == "0.25"  # the working copy is as it was
    assert not run(first, "git", "status", "--porcelain")
    dvc(first, "exp", "run", "-n", "high", "-S", "reinforce.beta=0.75")
    assert (first / "models/dgpo").read_text() == "0.75"

    monkeypatch.chdir(first)
    tree, head, *tried = rows(["dgpo"])
    shown = {row.name.strip(): (row.average["dgpo"], changes(head.params, row.params)) for row in tried}
    assert shown == {"low": (0.875, ["reinforce.beta=0.125"]), "high": (0.25, ["reinforce.beta=0.75"])}
    assert (tree.name, tree.average) == ("working tree", {"dgpo": 0.25}) and head.average == {"dgpo": 0.75}
    changed = json.loads(dvc(first, "metrics", "diff", "HEAD", "low", "--json"))
    assert changed["metrics/evaluate-dgpo.json"]["average"] == {"old": 0.75, "new": 0.875, "diff": 0.125}
