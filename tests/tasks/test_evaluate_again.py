"""`dgpo evaluate`: a registered model is evaluated in a working directory of its own, with our index."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from dgpo_core.errors import UserError
from tasks.project import paths
from tasks.stages.data import generate
from tasks.stages.index import index
from tasks.stages.stage import stage
from tasks.tracking.evaluations import evaluate_again
from tasks.tracking.registry import store
from tests.tasks.miniature import make_project


@pytest.mark.thorough
def test_it_uses_folders_that_are_named_relative_to_ours(
    own_store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A dense encoder (hidden states of the student are vectors as good as any), and its collection."""
    encoder = {"kind": "dense", "model": "models/student", "max_tokens": 32}
    make_project(
        own_store,
        retrieval={"encoder": encoder, "location": "embedded:collections"},
        questions={"train": ["onehop"]},
        evaluate={"questions": 1, "chunk": 64},
    )
    generate()
    index()
    with stage("distill@kd", config={}, inputs=[paths.INDEX], outputs=[paths.MODELS / "kd"]) as run:
        shutil.copytree("models/teacher", paths.MODELS / "kd")
        run.register_model("kd", paths.MODELS / "kd")
    evaluate_again("kd")
    manifest = json.loads((paths.INDEX / "manifest.json").read_text())
    with store() as registry, registry.evaluation(registry.named("kd")) as evidence:
        assert json.loads((evidence / "made.json").read_text())["index"] == manifest["digest"]
    assert manifest["encoder"]["model"] == "models/student"
    capfd.readouterr()
    in_use = FileLock(f"collections/{manifest['collection']}.lock")
    with in_use, pytest.raises(UserError, match="was not evaluated"):
        evaluate_again("kd")
    assert "another process searches this index" in capfd.readouterr().err
