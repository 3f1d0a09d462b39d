"""Recipes x seeds: worktrees, the shared cache, going on where it was, the report (made-up evaluations)."""

import contextlib
import contextvars
import fcntl
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import resolve_profile
from dgpo_core.errors import UserError
from flows.workspace import one_at_a_time, open_workspace
from tasks.commands.cli import pool
from tests.conftest import ROOT
from tests.flows.restarts import restarted

pytestmark = pytest.mark.thorough

# Evaluations as the stages leave them, by the seed of params.yaml; the log is outside of all worktrees.
MAKE = """
import shutil, sys
from pathlib import Path
import yaml
from tests.dgpo_core.reporting.reproduction.synthetic import coin, make_runs

name, log = sys.argv[1], Path(sys.argv[2])
with log.open("a") as file:
    file.write(f"{name} {Path.cwd().name}\\n")
params = yaml.safe_load(Path("params.yaml").read_text())
if name == "train":
    if (log.parent / f"fail-{params['seed']}").exists():
        sys.exit("no luck")
    levels = {"student": 0.0, "teacher": 0.8, "kd": 0.4, "mine": 0.1}
    level = coin(levels)
    runs = make_runs(Path("made"), [params["seed"]], params["compare"], level, level, questions=3)
    runs.save()
    made = Path(f"made/seed-{params['seed']}")
    Path("plots").mkdir(exist_ok=True)
    shutil.move(made / "evaluation", "evaluation")
else:
    Path("shared.txt").write_text("the same for all seeds")
"""


def commit(what: str) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "add", what], check=True)
    subprocess.run([*git, "commit", "-qm", what], check=True)


@pytest.fixture
def project(dvc_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose pipeline takes no time; returns the log of what was executed."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    Path("make.py").write_text(MAKE)
    stages = {
        "data": {"cmd": f"python make.py data {log}", "deps": ["make.py"], "outs": ["shared.txt"]},
        "train": {
            "cmd": f"python make.py train {log}",
            "deps": ["shared.txt"],
            "params": ["seed"],
            "outs": ["evaluation", "plots"],
        },
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    shutil.copytree(ROOT / "profiles", "profiles")
    (Path(".gitignore")).write_text("/.runs/\n/reproduction/\n")
    commit("-A")
    return log


def test_every_seed_once_and_a_report_of_all(api: str, project: Path) -> None:
    from flows.pipeline import PipelineFailed
    from flows.reproduce import reproduce

    failing = project.parent / "fail-0"
    failing.touch()
    with pytest.raises(PipelineFailed, match="seed 0: train"):
        reproduce(recipes=["kd"], seeds=[1, 0])
    assert not Path("reproduction").exists()
    failing.unlink()
    reproduce(recipes=["kd"], seeds=[1, 0])
    # what no seed changes is made once; the other seed was finished although the first one failed
    executed = project.read_text().split("\n")
    assert executed == ["data tiny-seed-0", "train tiny-seed-0", "train tiny-seed-1", "train tiny-seed-0", ""]
    tables = json.loads(Path("reproduction/tiny/tables.json").read_text())
    assert "0.4" in json.dumps(tables) and Path("reproduction/tiny/index.html").is_file()
    kept = Path("reproduction/tiny/seeds")
    assert sorted(path.name for path in kept.iterdir()) == ["0", "1"]
    pool(kept, Path("pooled"))  # the same report again
    assert Path("pooled/results.md").read_bytes() == Path("reproduction/tiny/results.md").read_bytes()
    params = [yaml.safe_load(Path(f".runs/tiny-seed-{seed}/params.yaml").read_text()) for seed in (0, 1)]
    assert [p["seed"] for p in params] == [0, 1]
    assert list(params[0]["recipes"]["distill"]) == ["kd"]

    reproduce(recipes=["kd"], seeds=[0, 1])
    assert project.read_text().split("\n") == executed, "something finished was run again"


def test_a_new_commit_is_taken_and_results_are_kept(api: str, project: Path) -> None:
    from flows.reproduce import reproduce

    reproduce(recipes=["kd"], seeds=[0])
    Path("new.txt").write_text("a file of the next commit")
    profile = Path("profiles/tiny.yaml")  # changed, but not in a commit
    profile.write_text(profile.read_text().replace("gpus: 0", "gpus: 3"))
    commit("new.txt")
    reproduce(recipes=["kd"], seeds=[0])
    assert Path(".runs/tiny-seed-0/new.txt").is_file()
    assert yaml.safe_load(Path(".runs/tiny-seed-0/params.yaml").read_text())["workers"]["gpus"] == 0
    assert len(project.read_text().splitlines()) == 2


def test_a_recipe_of_params_yaml_can_be_named_beside_the_papers(api: str, project: Path) -> None:
    from flows.reproduce import reproduce

    params = resolve_profile(Path("profiles/tiny.yaml"))
    params["recipes"]["reinforce"] |= {"mine": {"start": "student", "guidance": "none"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    commit("params.yaml")
    reproduce(recipes=["kd", "mine"], seeds=[0])
    recipes = yaml.safe_load(Path(".runs/tiny-seed-0/params.yaml").read_text())["recipes"]
    assert (list(recipes["distill"]), list(recipes["reinforce"])) == (["kd"], ["mine"])
    tables = json.loads(Path("reproduction/tiny/tables.json").read_text())
    assert list(tables["exact_match"]) == ["student", "teacher", "kd", "mine"]


def test_bad_arguments(api: str, project: Path) -> None:
    from flows.reproduce import reproduce

    with pytest.raises(UserError, match="there is no recipe 'dpo'"):
        reproduce(recipes=["dpo"], seeds=[0])
    with pytest.raises(UserError, match="no such profile"):
        reproduce(profile="huge", seeds=[0])
    shutil.copyfile("profiles/tiny.yaml", "profiles/mine.yaml")
    with pytest.raises(UserError, match=r"commit \w{8}, .*no such profile"):
        reproduce(profile="mine", seeds=[0])
    assert not list(Path(".runs").iterdir())
    result = subprocess.run(
        [sys.executable, "-m", "flows.reproduce", "--seed", "x"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "--seed" in result.stderr
    assert not project.exists()


def test_a_run_that_always_crashes_is_not_started_for_ever(api: str, project: Path) -> None:
    from flows.reproduce import reproduce

    state = restarted(reproduce, 6, {"recipes": ["kd"], "seeds": [0]})
    assert state.is_failed() and "was started 6 times" in str(state.message)
    assert not project.exists()


def test_a_twin_of_a_living_run_waits_before_it_touches_anything(
    api: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.reproduce import reproduce

    root = Path().resolve()
    of_the_living = open_workspace(root, "tiny-seed-1", keep_lock=True).tree / "params.yaml"
    of_the_living.write_text("written: by the living\n")
    waits, refused = threading.Event(), threading.Event()
    flock = fcntl.flock

    def announced(file: int, operation: int) -> None:
        if Path(f"/proc/self/fd/{file}").readlink().name == "tiny-seed-1.lock":  # the others are git's
            waits.set()
        flock(file, operation)

    def twin() -> None:
        with contextlib.suppress(UserError):  # which ends it without any stage
            reproduce(recipes=["dpo"], seeds=[1])
        refused.set()

    with one_at_a_time(root, "tiny-seed-1"):
        monkeypatch.setattr(fcntl, "flock", announced)
        threading.Thread(target=contextvars.copy_context().run, args=(twin,), daemon=True).start()
        assert waits.wait(60)
        assert not refused.wait(0.5)
        assert of_the_living.read_text() == "written: by the living\n"
    assert refused.wait(60)
    assert of_the_living.exists()  # what an earlier run has made is nothing to remove
