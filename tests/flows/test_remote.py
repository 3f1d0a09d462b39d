"""Stages on other workers: what can go wrong before there is one (test_deployments has the rest)."""

from pathlib import Path

import pytest

from dgpo_core.errors import UserError
from flows.workspace import open_workspace
from tasks.project.graph import Stage
from tests.conftest import commit_all, git


@pytest.fixture
def root(dvc_repository: Path) -> Path:
    """Make a project without stages."""
    Path("dvc.yaml").write_text("stages: {}\n")
    commit_all()
    return dvc_repository.resolve()


def test_a_remote_that_does_not_answer_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Prefect, which must not be imported before the tests' server runs.
    from flows.execution import StageFailed
    from flows.remote import run_elsewhere

    git("remote", "add", "origin", root / "nowhere")
    monkeypatch.setenv("DGPO_PUSH", "1")
    stage = Stage(name="train", pool="gpu")
    with pytest.raises(StageFailed, match="train: cannot publish runs/otter") as caught:
        run_elsewhere(stage, open_workspace(root, "otter"), force=False, pipeline_run=None)
    assert caught.value.retryable


def test_a_stage_is_run_at_the_commit_of_its_own_run(root: Path) -> None:
    """Two runs' stages that come to one clone at a time: git keeps what was fetched last in one place."""
    from flows.remote import _checkout

    git("clone", "-q", ".", "other")
    commits = {}
    for name in ("otter", "heron"):
        run = open_workspace(root, name)
        (run.tree / "dvc.yaml").write_text(f"stages: {{}}  # {name}\n")
        commits[name] = run.save(name)
    other = root / "other"
    for name in ("otter", "heron"):
        tree = _checkout(other, f"runs/{name}", commits[name], f"{name}--train")
        assert name in (tree / "dvc.yaml").read_text()
    assert not (other / ".git" / "FETCH_HEAD").exists()
    with pytest.raises(UserError, match="couldn't find remote ref"):
        _checkout(other, "runs/unpushed", "0" * 40, "unpushed--train")


def test_who_has_not_said_how_a_branch_gets_to_another_pool_is_asked_before_the_start(
    dvc_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.remote import refuse_without_push

    train = Stage(name="train", pool="gpu")
    monkeypatch.delenv("DGPO_PUSH", raising=False)
    monkeypatch.setenv("DGPO_POOL", "cpu")
    refuse_without_push([train], dvc_repository)  # no remote: both workers must be in this clone
    git("remote", "add", "origin", "elsewhere")
    with pytest.raises(UserError, match=r"train belongs to the pool gpu.*dgpo worker --push"):
        refuse_without_push([train], dvc_repository)
    refuse_without_push([Stage(name="report")], dvc_repository)
    for said in ("0", "1"):
        monkeypatch.setenv("DGPO_PUSH", said)
        refuse_without_push([train], dvc_repository)
