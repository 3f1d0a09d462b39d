"""Lineage as its users see it, and models that are made again: a real git and DVC repository."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from dgpo_core.evaluation.promotion import read_evaluation
from tasks.commands.lineage import OTHER, SAME, show
from tasks.tracking.evaluations import evaluate_again, register_trained
from tasks.tracking.registry import store
from tests.conftest import make_workplace
from tests.tasks.miniature import ROOT, change_params, git, make_project

MANIFEST = (
    '{"collection": "c", "digest": "5", "passages": 1, "average_words": 1, "dense_size": null, '
    '"encoder": {}, "shards": []}'
)
PIPELINE = """
stages:
  index:
    cmd: mkdir -p data/index && cp manifest.json data/index/
    params: [world.seed]
    outs: [data/index]
  distill:
    foreach: [kd]
    do:
      cmd: mkdir -p models/${item} && RECIPE
      params: [seed]
      deps: [data/index]
      outs:
        - models/${item}
"""
CHAMPION = "models:/search-agent/1"


@pytest.fixture
def repository(own_store: Path, empty_dvc_repository: Path) -> Path:
    """A project with a pipeline of two stages, nothing run."""
    (own_store / "tasks").unlink()
    shutil.copytree(empty_dvc_repository, own_store, dirs_exist_ok=True)
    make_project(own_store, ["kd"], promote={"log_weights": False})
    (own_store / "manifest.json").write_text(MANIFEST)
    (own_store / ".gitignore").write_text("/runs/\n/.state/\n/mlruns/\n")
    return own_store


def train(recipe: str, pipeline: str = PIPELINE) -> None:
    """Run the pipeline whose model is what `recipe` writes, commit, and register."""
    Path("dvc.yaml").write_text(pipeline.replace("RECIPE", recipe))
    subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True, timeout=120)
    git("add", "-A")
    git("commit", "-qm", "A model")
    register_trained()


def test_a_lineage_is_read_from_the_registry_and_made_again(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("cat data/index/manifest.json > models/kd/weights")
    commit = git("rev-parse", "HEAD")
    capsys.readouterr()
    assert show("kd", as_json=False, params=False, verify=False) == SAME
    said = capsys.readouterr().out
    assert f"code      {commit}\n" in said
    assert "index     digest 5, 1 passages" in said
    assert f"git worktree add --detach ../recreated {commit}" in said
    assert f"dgpo lineage {CHAMPION} --params > ../recreated/params.yaml" in said
    assert "dvc repro distill@kd" in said
    assert "this checkout has the same code and parameters" in said

    # the checkout moves on; what was written down does not
    change_params(distill={"epochs": 9})
    git("commit", "-qam", "Another setting")
    Path("dvc.lock").unlink()
    assert show(CHAMPION, as_json=True, params=False, verify=False) == SAME
    stored = json.loads(capsys.readouterr().out)
    assert stored["code"] == {"commit": commit, "dirty": []}
    assert stored["changed"]["distill.epochs"] == [5, 2]
    assert any(line == "parameters: distill.epochs is 9 here, was 2" for line in stored["differences"])
    assert any(line.startswith("index: data/index is not made in dvc.lock") for line in stored["differences"])
    show(CHAMPION, as_json=False, params=True, verify=False)
    printed = capsys.readouterr().out
    assert "epochs: 2" in printed and "epochs: 9" not in printed


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "index", "code", "said"),
    [
        ("cat data/index/manifest.json > models/kd/weights", "", SAME, "made again, byte for byte\n$"),
        (
            "date +%s%N > models/kd/weights",
            "",
            OTHER,
            r"with other bytes .*\n  models/kd: sha256 is",
        ),
        (
            "cp data/index/manifest.json models/kd/weights",
            " && date +%N > data/index/t",
            SAME,
            "made again, byte for byte\nother bytes on the way to it:\n  index: data/index is",
        ),
    ],
)
def test_verification_compares_the_bytes(
    repository: Path, capsys: pytest.CaptureFixture[str], recipe: str, index: str, code: int, said: str
) -> None:
    copy = "cp manifest.json data/index/"
    train(recipe, PIPELINE.replace(copy, copy + index))
    assert show(CHAMPION, as_json=False, params=False, verify=True) == code
    printed = capsys.readouterr().out
    assert re.search(said, printed) and ("  index: data/index" in printed) == bool(index)
    assert git("worktree", "list").count("\n") == 0, "nothing is left behind"


def test_uncommitted_sources_are_said_and_not_made_again(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dgpo_core").mkdir()
    Path("dgpo_core/new.py").touch()
    git("add", "-A")
    git("commit", "-qm", "Start")
    Path("dgpo_core/new.py").write_text("1")
    Path("dvc.yaml").write_text(PIPELINE.replace("RECIPE", "touch models/kd/weights"))
    subprocess.run([sys.executable, "-m", "dvc", "repro"], check=True, timeout=120)
    register_trained()
    capsys.readouterr()
    show(CHAMPION, as_json=False, params=False, verify=False)
    said = capsys.readouterr().out
    assert "with other sources in" in said and "dgpo_core/new.py" in said
    assert "nothing: no commit has its sources" in said
    with pytest.raises(UserError, match=r"it cannot be made again: no commit has its sources .*new\.py"):
        show(CHAMPION, as_json=False, params=False, verify=True)


@pytest.mark.slow
def test_a_real_model_is_made_again(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real pipeline on a miniature world: train, register, and make it again byte for byte."""
    tree = tmp_path / "tree"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True, timeout=120)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    make_workplace(tree, monkeypatch, f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("PYTHONPATH", str(tree))
    small = tmp_path / "small"
    small.mkdir()
    make_project(small, ["kd"])
    shutil.copyfile(small / "params.yaml", tree / "params.yaml")
    # the committed base models stay: their stages are as committed, whatever the world is
    for stage in ("data", "index", "teach", "filter", "distributions", "distill@kd"):
        command = [sys.executable, "-m", "dvc", "repro", "-q", "--single-item", stage]
        subprocess.run(command, check=True, timeout=600)
    with store() as registry:
        (version,) = registry.versions()
    assert version.tags["stage"] == "distill@kd"
    assert show(version.reference, as_json=False, params=False, verify=True) == SAME
    assert "made again, byte for byte" in capsys.readouterr().out
    evaluate_again(version.reference)
    with store() as registry, registry.evaluation(registry.version(version.number)) as evidence:
        made = json.loads((evidence / "made.json").read_text())
        assert made["model"] == version.hash
        datasets = list(load_params().questions.test)
        assert set(read_evaluation(evidence, datasets).arcap) >= {"source_em_nq", "query_hit_nq"}
