"""Stages on other workers: what can go wrong before there is one (test_deployments has the rest)."""

import subprocess
from pathlib import Path

import pytest

from flows.dag import Stage
from flows.workspace import open_workspace


def test_a_remote_that_does_not_answer_is_tried_again(
    dvc_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.execution import (
        StageFailed,
    )  # Prefect, which must not be imported before the tests' server runs
    from flows.remote import run_elsewhere

    root = dvc_repository.resolve()
    Path("dvc.yaml").write_text("stages: {}\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", "project"], check=True)
    subprocess.run([*git, "remote", "add", "origin", str(root / "nowhere")], check=True)
    stage = Stage("train", (), pool="gpu")
    with pytest.raises(StageFailed, match="train: cannot publish runs/otter") as caught:
        run_elsewhere(stage, open_workspace(root, "otter"), force=False, pipeline_run=None)
    assert caught.value.retryable
