"""Stages `base-model` and `given`: what is built, what is left alone, what DVC sees."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.errors import UserError
from dgpo_core.world import pretraining as loop
from tasks.project.graph import read_dag
from tasks.project.paths import GIVEN
from tasks.stages.base_model import bring_up_to_date, build
from tasks.stages.given import link
from tasks.stages.stage import STATE, Run
from tests.conftest import ROOT
from tests.tasks.miniature import change_params, git, make_project

PHASE = {"batch_size": 2, "warmup_steps": 1}
SMALL: dict[str, Any] = {
    "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16},
    "phases": [{"kind": "reading", "steps": 2, **PHASE}, {"kind": "protocol", "steps": 4, **PHASE}],
}
WEIGHTS = Path("models/small/model.safetensors")


def test_a_build_does_not_continue_with_episodes_of_other_passages(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed in the protocol phase, and then retrieval.top_k is changed."""
    base = {"world": {"passages": 150}, "worlds": 1, "expert_episodes": 12, "models": {"small": SMALL}}
    make_project(workplace, base_models=base)
    change_params(retrieval={"top_k": 1})
    build("small")
    expected = WEIGHTS.read_bytes()
    WEIGHTS.unlink()
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    progress = Run.progress

    def kill(self: Run, done: float, total: float, unit: str = "", **values: Any) -> None:
        progress(self, done, total, unit, **values)
        if done == 5:  # the third step of the protocol phase, after its checkpoint
            raise KeyboardInterrupt

    change_params(retrieval={"top_k": 3})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "progress", kill)
        build("small")
    assert (STATE / "base-model@small/1-protocol").exists()
    change_params(retrieval={"top_k": 1})
    build("small")
    assert WEIGHTS.read_bytes() == expected


def project_of_dvc(folder: Path, **models: str) -> None:
    """A git and DVC repository with this tree's graph and sources, a base model `small` and own models."""
    base = {"world": {"passages": 150}, "worlds": 1, "expert_episodes": 12}
    shape, phases = SMALL["shape"], [{"kind": "reading", "steps": 2, **PHASE}]
    make_project(folder, base_models={**base, "models": {"small": {"shape": shape, "phases": phases}}})
    for name in ("dvc.yaml", "dgpo_core", "tasks"):
        Path(name).symlink_to(ROOT / name)
    shutil.copy(ROOT / ".dvcignore", ".dvcignore")  # compiled code is none of the sources
    if models:
        change_params(models=models)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.thorough
def test_what_is_built_is_kept_for_other_worktrees(
    dvc_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in git: DVC's run cache keeps nothing that DVC may not remove before the stage runs."""
    project_of_dvc(dvc_repository, student="models/small")
    bring_up_to_date("small")
    expected = WEIGHTS.read_bytes()
    shutil.rmtree(WEIGHTS.parent)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.stages.base_model.build", lambda name: pytest.fail(f"{name} is built again"))
        bring_up_to_date("small")
        assert WEIGHTS.read_bytes() == expected
        change_params(protocol={"instruction": "paper"})  # which a model that only reads never sees
        bring_up_to_date("small")
    change_params(base_models={"seed": 1})
    bring_up_to_date("small")
    assert WEIGHTS.read_bytes() != expected


@pytest.mark.thorough
def test_a_model_of_ones_own_touches_nothing_in_git(dvc_repository: Path) -> None:
    """As `dvc exp run -S models.student=own` does it; DVC sees what is in that folder."""
    project_of_dvc(dvc_repository)
    Path("models/student").unlink()
    shutil.copytree(ROOT / "models/student", "models/student")
    student = {"base_models": {"models": {"student": SMALL | {"phases": SMALL["phases"][:1]}}}}
    change_params(base_models={"models": {}})
    change_params(**student)
    dvc = (sys.executable, "-m", "dvc")
    link("student")
    run(*dvc, "commit", "-q", "-f", "base-model@student", "given@student")
    git("add", "-A")
    git("commit", "-qm", "as built")
    assert "didn't change" in run(*dvc, "repro", "given@student")
    shutil.copytree("models/student", "own")
    change_params(models={"student": "own"}, protocol={"instruction": "paper"})
    assert "no model of this run" in run(*dvc, "repro", "given@student")
    assert (GIVEN / "student").resolve() == Path("own").resolve()
    assert "models/student" not in git("status", "--porcelain", "models/student")
    Path("own/README.md").write_text("trained on")
    assert read_dag(dvc_repository)["given@student"].changed
    run(*dvc, "repro", "given@student")
    change_params(models={"student": "models/student"})
    assert "as git has it" in run(*dvc, "repro", "given@student")
    assert git("status", "--porcelain", "models") == ""


def test_what_no_run_uses_is_neither_built_nor_touched(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else changes; a folder that is missing is none to be built. What is used is."""
    make_project(workplace)
    change_params(models={"student": "own"}, protocol={"instruction": "paper"})
    built: list[str] = []
    monkeypatch.setattr("tasks.stages.base_model.build", built.append)
    before = {path: path.read_bytes() for path in Path("models/student/").iterdir()}
    bring_up_to_date("student")
    assert {path: path.read_bytes() for path in Path("models/student/").iterdir()} == before
    Path("models/student").unlink()
    bring_up_to_date("student")
    assert [path.name for path in Path("models/student").iterdir()] == ["README.md"] and not built
    change_params(models={"student": "models/student"})
    monkeypatch.setattr("tasks.stages.base_model.cache_folder", lambda: None)
    monkeypatch.setattr("tasks.stages.base_model.is_committed", lambda name, config: False)
    bring_up_to_date("student")
    assert built == ["student"]


def test_a_model_of_the_hub_is_named(workplace: Path) -> None:
    make_project(workplace)
    change_params(models={"student": "someone/model"})
    link("student")
    link("teacher")
    assert (GIVEN / "student").read_text() == "someone/model\n"
    assert (GIVEN / "teacher").readlink() == Path("../teacher")
    change_params(models={"student": str(workplace / "models/teacher")})
    link("student")
    assert (GIVEN / "student").resolve() == (workplace / "models/teacher").resolve()
    change_params(models={"student": "models/student"})
    link("student")
    assert (GIVEN / "student").readlink() == Path("../student")
    with pytest.raises(UserError, match="the given models are student and teacher"):
        link("kd")
