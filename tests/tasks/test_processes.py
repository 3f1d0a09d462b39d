"""The training stages in two processes against one: the real stages, models and rollouts, in miniature."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.project import paths
from tasks.stages.distill import distill
from tasks.stages.distributions import distributions
from tasks.stages.filter import filter_episodes
from tasks.stages.reinforce import reinforce
from tasks.stages.teach import teach
from tests.conftest import make_workplace
from tests.tasks.miniature import change_params, curves

pytestmark = pytest.mark.slow
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None
ZERO = pytest.param(
    {"engine": "deepspeed", "zero_stage": 3},
    marks=pytest.mark.skipif(NO_DEEPSPEED, reason="DeepSpeed is not installed"),
)
TWO: dict[str, Any] = {"processes": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, indexed_project: Path, mlflow_store: str) -> Path:
    """A project in which both stages have trained in one process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(indexed_project, folder, dirs_exist_ok=True, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        teach()
        filter_episodes()
        distributions()
        distill("kd")
        reinforce("dgpo")
    return folder


def prepared(alone: Path, folder: Path, compute: dict[str, Any]) -> None:
    """The inputs of both stages, and `compute` in params.yaml."""
    for name in ("data", "models"):
        shutil.copytree(alone / name, folder / name, symlinks=True)
    shutil.rmtree(folder / paths.MODELS / "dgpo")
    shutil.copyfile(alone / "params.yaml", folder / "params.yaml")
    change_params(folder, compute=compute)


def run(stage: str, recipe: str, folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tasks.stages.{stage}", recipe]
    subprocess.run(command, cwd=folder, env=environment, check=True)


@pytest.mark.parametrize("compute", [{}, ZERO])
def test_distillation(alone: Path, workplace: Path, compute: dict[str, Any]) -> None:
    prepared(alone, workplace, TWO | compute)
    shutil.rmtree(workplace / paths.MODELS / "kd")
    run("distill", "kd", workplace)
    found, expected = curves("distill-kd", workplace), curves("distill-kd", alone)
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=5e-3)
    assert (workplace / paths.MODELS / "kd/model.safetensors").is_file()


@pytest.mark.parametrize("compute", [{}, ZERO])
def test_reinforcement(alone: Path, workplace: Path, compute: dict[str, Any]) -> None:
    """The episodes of the first step are the same, and so is what is learned from them."""
    prepared(alone, workplace, TWO | compute)
    run("reinforce", "dgpo", workplace)
    found, expected = curves("reinforce-dgpo", workplace), curves("reinforce-dgpo", alone)
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=1e-3, abs=1e-5)
    assert all(0 <= row["em"] <= 1 for row in found)


@pytest.mark.parametrize("compute", [{}, ZERO])
def test_killed_training_continues_to_the_same_model(
    alone: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory, compute: dict[str, Any]
) -> None:
    whole = tmp_path_factory.mktemp("whole")
    for folder in (whole, workplace):
        prepared(alone, folder, TWO | compute)
    run("reinforce", "dgpo", whole)
    command = [sys.executable, "-m", "tasks.stages.reinforce", "dgpo"]
    killed = subprocess.Popen(command, cwd=workplace, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while killed.poll() is None and not (workplace / ".state/reinforce@dgpo/checkpoints/000001").exists():
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the stage ended before it could be killed"
    run("reinforce", "dgpo", workplace)
    assert curves("reinforce-dgpo", workplace) == curves("reinforce-dgpo", whole)
    weights = paths.MODELS / "dgpo/model.safetensors"
    assert (workplace / weights).read_bytes() == (whole / weights).read_bytes()
