"""`dgpo collections` and the stage `index` with a Qdrant server: build, check, list, keep, remove."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from dgpo_core.retrieval import qdrant_server as loading
from dgpo_core.retrieval.index import open_index
from dgpo_core.retrieval.service import RetrieverService, make_app
from dgpo_core.retrieval.shards import read_manifest
from tasks.commands import collections
from tasks.stages.index import index
from tasks.stages.inputs import retriever
from tests.conftest import make_workplace
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer, running
from tests.dgpo_core.retrieval.test_service import foreign
from tests.tasks.miniature import change_params, make_project
from tests.web import served


@pytest.fixture
def qdrant(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantServer]:
    monkeypatch.setattr(loading, "POLL", 0.005)
    with running(QdrantServer()) as server:
        yield server


@pytest.fixture
def project(
    indexed_project: Path,
    tmp_path: Path,
    qdrant: QdrantServer,
    monkeypatch: pytest.MonkeyPatch,
    mlflow_store: str,
) -> Path:
    """With the data of the indexed project, and no index yet."""
    make_workplace(tmp_path, monkeypatch, mlflow_store)
    make_project(tmp_path, retrieval={"location": qdrant.url})
    (tmp_path / "data").mkdir()
    for name in ("corpus.jsonl", "questions"):
        (tmp_path / "data" / name).symlink_to(indexed_project / "data" / name)
    return tmp_path


def change(**settings: object) -> None:
    change_params(retrieval=settings)


def test_from_the_stage_to_a_restored_snapshot(
    project: Path, indexed_project: Path, qdrant: QdrantServer, capsys: pytest.CaptureFixture[str]
) -> None:
    index()
    metrics = json.loads((project / "metrics/index.json").read_text())
    assert metrics == json.loads((indexed_project / "metrics/index.json").read_text())
    assert metrics["search_recall"] == 1.0
    alias = read_manifest(project / "data/index").collection
    first = loading.alias_target(qdrant.engine, alias)
    change(qdrant={"shards": 2})
    collections.build()
    second = loading.alias_target(qdrant.engine, alias)
    assert first and second and first != second
    capsys.readouterr()
    collections.show()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["collection", "points", "status", "readers"]
    told = {row.split()[0]: row for row in rows}
    assert told[first].endswith("none: removable")
    assert told[second].endswith(alias)
    collections.snapshot()
    place = capsys.readouterr().out.split()[0]
    assert place.startswith(f"{qdrant.url}/collections/{second}/snapshots/")
    collections.remove(first)
    with pytest.raises(UserError, match="readers use it"):
        collections.remove(second)
    qdrant.requests.clear()
    collections.restore(place)
    assert not [name for name, _ in qdrant.requests if name.endswith("/points")]
    change(location="embedded")
    with pytest.raises(UserError, match=r"retrieval\.location: embedded is no Qdrant server"):
        collections.show()


def test_too_little_recall_ends_the_stage_and_keeps_its_vectors(project: Path, qdrant: QdrantServer) -> None:
    """The collection is made and measured, and readers never see it; other settings go on from there."""
    qdrant.inexact = True
    with pytest.raises(UserError, match=r"min_recall: recall@3 against exact search is 0\.6\d*, below 0\.95"):
        index()
    assert not (project / "data/index").exists()
    assert qdrant.engine.get_aliases().aliases == []
    (vectors,) = project.glob(".state/index/shards/*.parquet")
    written = vectors.stat().st_mtime_ns
    qdrant.requests.clear()
    change(min_recall=0.5)
    index()
    assert (project / "data/index" / vectors.name).stat().st_mtime_ns == written, "not encoded again"
    assert not [name for name, _ in qdrant.requests if name.endswith("/points")], "not uploaded again"
    assert len(qdrant.engine.get_aliases().aliases) == 1


def test_with_a_service_nothing_is_encoded(project: Path, indexed_project: Path) -> None:
    """The stage writes down which index the service has; that one is searched, and no other."""
    made = read_manifest(indexed_project / "data/index")
    config = load_params(indexed_project / "params.yaml").retrieval
    retrieval = RetrieverService(top_k=3)
    retrieval.open(open_index(indexed_project / "data/index", config), made.passages)
    with served(make_app(retrieval)) as url:
        change(location=f"retriever+{url}")
        index()
        manifest = read_manifest(project / "data/index")
        assert (manifest.digest, manifest.passages, manifest.shards) == (made.digest, made.passages, [])
        expected = json.loads((indexed_project / "metrics/index.json").read_text())
        del expected["search_recall"]
        assert json.loads((project / "metrics/index.json").read_text()) == expected
        assert retriever(load_params()).digest == made.digest
        change(location="embedded")
        with pytest.raises(UserError, match=r"make it again \(dvc repro --force index\)"):
            retriever(load_params())
    retrieval.close()


def test_a_service_that_is_no_retriever_is_refused_at_once(project: Path) -> None:
    """It answers /health, as every web server does, but not the first question."""
    with served(foreign({"result": [[{"document": {"url": "a"}}]] * 2})) as url:
        change(location=f"retriever+{url}")
        with pytest.raises(UserError, match=r"retrieval\.location: .*does not answer as a retriever does"):
            index()
    assert not (project / "data/index").exists()


def test_questions_in_another_language_than_the_corpus(project: Path) -> None:
    change(location="embedded")
    corpus = project / "data/corpus.jsonl"
    corpus.unlink()
    corpus.write_text(json.dumps({"id": "1", "contents": '"Тест"\nГород стоит на реке.'}) + "\n")
    with pytest.raises(UserError, match=r"(\d+) of \1 validation questions find nothing.*a dense encoder"):
        index()
    change(location="embedded", recall_queries=0)
    index()
