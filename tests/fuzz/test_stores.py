"""What MLflow's server and DVC leave or answer is read, or a failure of theirs in a line."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.yaml_text import as_text
from dgpo_core.errors import InfrastructureError, UserError
from tasks.commands import experiments
from tasks.project import dvc
from tasks.tracking.registry import store
from tests.conftest import ROOT
from tests.fuzz.inputs import as_json, cases, changed, changed_bytes, damaged, read_or_refused
from tests.web import Handler, handled

LOCK = {
    "schema": "2.0",
    "stages": {
        "data": {"cmd": "python", "outs": [{"path": "data/corpus.jsonl", "md5": "a"}]},
        "index": {
            "cmd": "python", "deps": [{"path": "data/corpus.jsonl", "md5": "a"}],
            "params": {"params.yaml": {"retrieval.top_k": 3}},
            "outs": [{"path": "data/index", "md5": "b.dir"}],
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a cache; nobody waits for a DVC that rewrites its lock."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.project.dvc.time.sleep", lambda _seconds: None)
        patch.setattr(dvc, "cache_folder", lambda: folder / "cache")
        yield folder


@cases()
@given(content=changed(LOCK).map(lambda lock: as_json(lock)) | damaged(as_text(LOCK).encode()))
def test_locks_of_dvc(project: Path, content: bytes) -> None:
    (project / "dvc.lock").write_bytes(content)
    lock = read_or_refused(lambda: dvc.read_lock(project), project / "dvc.lock")
    if lock is not None:
        read_or_refused(lambda: dvc.upstream(lock, ["data/index"]), "dvc.lock")


FILE = "0" * 32
FOLDER = "1" * 32 + ".dir"
LISTING = [{"md5": FILE, "relpath": "a/b.txt"}]


@cases()
@given(content=changed(LISTING).map(as_json) | damaged(as_json(LISTING)))
def test_folders_of_dvcs_cache(project: Path, content: bytes) -> None:
    """A folder is whole or absent, and nothing is written beside it."""
    for name, kept in ((FILE, b"x"), (FOLDER, content)):
        path = project / "cache/files/md5" / name[:2] / name[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kept)
    own = project / "models" / "kd"
    before = set(project.iterdir())
    written = read_or_refused(lambda: dvc.from_cache(FOLDER, own), FOLDER[2:])
    assert bool(written) == own.exists() or own.is_dir()
    assert set(project.iterdir()) <= before | {project / "models"}


STATES = [
    {"rev": "workspace", "data": {"params": {}, "metrics": {}}, "experiments": [{"revs": [{"rev": "a"}]}]}
]


@cases()
@given(content=changed(STATES).map(as_json) | damaged(as_json(STATES)))
def test_experiments_of_dvc(content: bytes) -> None:
    def run(*_: Any, **__: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess([], 0, content.decode("utf-8", "replace"), "ERROR: x")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.commands.experiments.subprocess.run", run)
        read_or_refused(lambda: experiments.rows(["kd"]), "DVC")


@cases(0.05)  # each asks DVC, for half a second
@given(content=changed_bytes((ROOT / "dvc.yaml").read_bytes()))
def test_graphs_of_dvc(empty_dvc_repository: Path, content: bytes) -> None:
    from tasks.project.graph import read_dag

    (empty_dvc_repository / "dvc.yaml").write_bytes(content)
    (empty_dvc_repository / "params.yaml").write_text("recipes: {}\n")
    try:
        read_or_refused(lambda: read_dag(empty_dvc_repository), empty_dvc_repository)
    finally:
        (empty_dvc_repository / "dvc.yaml").unlink()


EXPERIMENT = {"experiment": {"experiment_id": "1", "name": "dgpo", "lifecycle_stage": "active"}}
VERSION = {
    "name": "search-agent", "version": "1", "run_id": "r", "status": "READY", "creation_timestamp": 1,
    "tags": [{"key": "recipe", "value": "kd"}, {"key": "sha256", "value": "x"}],
}  # fmt: skip
VERSIONS = {"model_versions": [VERSION], "model_version": VERSION}


class Mlflow(Handler):
    """Says `said` of models, and what is right of the experiment."""

    said = (200, b"")

    def do_GET(self) -> None:
        status, content = self.said
        if "experiments" in self.path:
            status, content = 200, as_json(EXPERIMENT)
        self.answer(status, {"Content-Type": "application/json"}, content)


@pytest.fixture(scope="module")
def mlflow_server() -> Iterator[str]:
    with handled(Mlflow) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", url)
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield url


@pytest.mark.usefixtures("mlflow_server")
@cases(0.3)
@given(
    status=st.sampled_from([200] * 5 + [204, 302, 401, 403, 404, 429, 500]),
    content=changed(VERSIONS).map(as_json) | damaged(as_json(VERSIONS)),
)
def test_answers_of_mlflow(status: int, content: bytes) -> None:
    Mlflow.said = status, content
    for reference in ("models:/search-agent@champion", "models:/search-agent/1", "kd"):
        try:
            with store() as registry:
                registry.named(reference)
        except (InfrastructureError, UserError) as error:
            assert "\n" not in str(error)


def test_the_listing_that_is_changed_is_read_as_it_is(project: Path) -> None:
    (project / "cache/files/md5" / FOLDER[:2]).mkdir(parents=True, exist_ok=True)
    (project / "cache/files/md5" / FOLDER[:2] / FOLDER[2:]).write_text(json.dumps(LISTING))
    (project / "cache/files/md5" / FILE[:2]).mkdir(parents=True, exist_ok=True)
    (project / "cache/files/md5" / FILE[:2] / FILE[2:]).write_text("x")
    assert dvc.from_cache(FOLDER, project / "own")
    assert (project / "own/a/b.txt").read_text() == "x"
