"""`dgpo doctor`, as its users run it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tasks.miniature import ROOT


def doctor(folder: Path, **environment: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the findings by subject."""
    env = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(folder),
    }
    env |= {"HF_HOME": str(folder / "hub"), "LANG": "C.UTF-8", **environment}
    command = [sys.executable, "-m", "tasks.commands.cli", "doctor", "--json"]
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout, done.stderr
    return done.returncode, {f["subject"]: f for f in json.loads(done.stdout)["findings"]}


def use(folder: Path, profile: str) -> None:
    if not (folder / "profiles").exists():
        (folder / "profiles").symlink_to(ROOT / "profiles")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-m", "tasks.commands.cli", "use", profile], cwd=folder, env=env, check=True
    )


@pytest.fixture
def project(dvc_repository: Path) -> Path:
    (dvc_repository / "models").mkdir()
    for name in ("student", "teacher"):
        (dvc_repository / "models" / name).symlink_to(ROOT / "models" / name)
    shutil.copytree(ROOT / "constraints", dvc_repository / "constraints")
    use(dvc_repository, "tiny")
    return dvc_repository


def test_the_embedded_world_needs_nothing(project: Path) -> None:
    code, found = doctor(project)
    assert code == 0, found
    assert {finding["level"] for finding in found.values()} == {"ok"}
    assert {"disk", "host memory", "models.student", "MLflow", "git and DVC"} < found.keys()


def test_the_papers_profile_without_a_gpu_and_without_a_network(project: Path) -> None:
    use(project, "paper-llama-8b")
    code, found = doctor(project, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1
    assert found["GPUs"]["level"] == "error" and "dgpo use tiny" in found["GPUs"]["advice"]
    for name in ("models.student", "models.teacher", "retrieval.encoder.model"):
        assert found[name]["level"] == "error" and "the hub is not reachable" in found[name]["message"]
    servers = ("retrieval.location", "rollout.server.student", "rollout.server.teacher")
    assert [found[name]["level"] for name in servers] == ["warning"] * 3  # started later, none is up


def test_a_broken_file_of_settings_is_the_last_finding(project: Path) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(params | {"sed": 1}))
    code, found = doctor(project)
    assert code == 1 and "sed: unknown key" in found["settings"]["message"]
    assert list(found)[-1] == "settings" and found["packages"]


def test_it_starts_without_heavy_libraries() -> None:
    code = (
        "import sys, tasks.commands.doctor;"
        "print([m for m in ('torch', 'transformers', 'mlflow', 'prefect', 'dvc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
