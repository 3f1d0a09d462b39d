"""An MLflow store of a test's own, for what is one thing in a store: the registered model and its aliases."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import make_store, make_workplace
from tests.tasks.miniature import make_project


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised sqlite file to copy (creating one takes seconds)."""
    return make_store(tmp_path_factory.mktemp("empty-store"))


@pytest.fixture
def own_store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory (see make_workplace) with a store in which nothing is registered."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    make_workplace(folder, monkeypatch, f"sqlite:///{tmp_path / 'mlflow.db'}")
    # the sources of this tree are those that the made-up dvc.lock names
    (folder / "tasks").symlink_to(Path(__file__).resolve().parents[2] / "tasks")
    return folder


@pytest.fixture(scope="session")
def indexed_project(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Path:
    """A miniature project with data, an index and the given models; nothing is trained. Not to be changed."""
    from tasks.stages.data import generate
    from tasks.stages.index import index

    folder = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        make_workplace(folder, patch, mlflow_store)
        make_project(folder)
        generate()
        index()
    return folder
