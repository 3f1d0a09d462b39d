"""Commit, uncommitted changes, dvc.lock and edited settings, in a real git repository."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import resolve_profile
from dgpo_core.config.recipes import Reinforcement
from tasks.tracking.lineage import (
    changed_settings,
    labels,
    lock_digest,
    locked_outputs,
    settings,
    stage_labels,
)
from tests.tasks.miniature import ROOT, git


@pytest.fixture
def repository(workplace: Path) -> Path:
    """A repository with one commit of a source, params.yaml of the tiny profile, and dvc.lock."""
    shutil.copytree(ROOT / "profiles", "profiles")
    Path("params.yaml").write_text(yaml.safe_dump(resolve_profile(Path("profiles/tiny.yaml"))))
    Path("source.py").write_text("1\n")
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    return workplace


def test_only_changes_that_no_run_records_make_it_dirty(repository: Path) -> None:
    assert labels()["git.dirty"] == "false"
    Path("params.yaml").write_text("seed: 7\n")
    Path("dvc.lock").write_text("schema: '2.0'\n")
    Path("untracked.txt").touch()
    assert labels()["git.dirty"] == "false"
    Path("source.py").write_text("2\n")
    assert labels()["git.dirty"] == "true"


def test_labels_name_what_is_known(repository: Path) -> None:
    known = {"git.commit": git("rev-parse", "HEAD"), "git.dirty": "false", "profile": "tiny", "seed": "0"}
    assert labels() == known
    Path("params.yaml").write_text("no parameters")
    assert labels() == {key: known[key] for key in ("git.commit", "git.dirty")}
    shutil.rmtree(".git")
    assert labels() == {}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("distill@kd", {"recipe": "kd"}),
        ("reinforce@dgpo", {"recipe": "dgpo"}),
        ("evaluate@teacher", {"model": "teacher"}),
        ("base-model@student", {"model": "student"}),
        ("report", {}),
    ],
)
def test_stage_labels(stage: str, expected: dict[str, str]) -> None:
    assert stage_labels(stage) == expected


def test_edited_settings_are_told_from_the_profiles(repository: Path) -> None:
    params = settings()
    assert params and changed_settings(params) == {}
    # another choice among the paper's rows is no edit; a value and a row of one's own are
    written = resolve_profile(Path("profiles/tiny.yaml"), ["ppo"])
    mine = {"start": "ppo", "algorithm": "grpo", "guidance": "none", "reference": "none"}
    written["recipes"]["reinforce"]["mine"] = mine
    written["reinforce"]["beta"] = 0.5
    Path("params.yaml").write_text(yaml.safe_dump(written))
    params = settings()
    assert params
    row = Reinforcement.model_validate(mine).model_dump()
    expected = {"reinforce": {"beta": 0.5}, "recipes": {"reinforce": {"mine": row}}}
    assert changed_settings(params) == expected
    shutil.rmtree("profiles")
    assert changed_settings(params) == {}


def test_lock_has_dvcs_own_digests(dvc_repository: Path) -> None:
    Path("dvc.yaml").write_text("stages:\n  one: {cmd: echo hello > one.txt, outs: [one.txt]}\n")
    subprocess.run(["dvc", "repro", "-q"], check=True)
    assert locked_outputs() == {"one": {"one.txt": hashlib.md5(b"hello\n").hexdigest()}}
    assert lock_digest() == hashlib.sha256(Path("dvc.lock").read_bytes()).hexdigest()


@pytest.mark.parametrize("text", [None, "stages: {one: {outs: [{pa", "", "stages:\n"])
def test_lock_that_is_missing_or_half_written_is_empty(workplace: Path, text: str | None) -> None:
    if text is not None:
        Path("dvc.lock").write_text(text)
    assert locked_outputs() == {}
