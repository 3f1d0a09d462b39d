"""What `dgpo doctor` finds of the index: its files, and what searches it elsewhere."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.service import RetrieverService, make_app
from tasks.commands.checks.index import index
from tests.dgpo_core.retrieval.test_service import served
from tests.tasks.commands.checks.test_checks import NOWHERE, profile, with_location
from tests.tasks.tracking.test_mlflow_faults import server


@pytest.fixture
def folder(workplace: Path) -> Path:
    """An index of three passages."""
    made = workplace / "data/index"
    made.mkdir(parents=True)
    pq.write_table(pa.table({"id": ["1", "2", "3"]}), made / "shard-00000.parquet")
    content = {"collection": "c", "digest": "d" * 64, "passages": 3, "shards": ["shard-00000.parquet"]}
    (made / "manifest.json").write_text(json.dumps(content))
    return made


def test_the_files_of_an_embedded_index(folder: Path) -> None:
    def found() -> tuple[str, str]:
        (only,) = index(profile("tiny"))
        return only.level, only.message + only.advice

    assert found() == ("ok", "3 passages in data/index")
    shard, manifest = folder / "shard-00000.parquet", folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"passages": 3', '"passages": 4'))
    assert found()[0] == "error" and "has 3 passages, its manifest says 4" in found()[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    assert (
        found()[0] == "error" and "cannot be read" in found()[1] and "dvc repro --force index" in found()[1]
    )
    shard.unlink()
    assert found()[0] == "error"
    manifest.write_text("[]")
    assert found()[0] == "error" and "not an index's manifest" in found()[1]
    manifest.unlink()
    assert found() == ("ok", "data/index is made by the stage index")


@pytest.mark.parametrize(
    ("status", "body", "level", "said"),
    [
        (200, {"result": {"points_count": 3}}, "ok", "3 points"),
        (200, {"result": {"points_count": 2}}, "warning", "has 2 points, the index 3"),
        (404, {"status": {"error": "Not found"}}, "warning", "dgpo collections build"),
        (401, {}, "error", "set QDRANT_API_KEY"),
    ],
)
def test_the_collection_on_a_server(folder: Path, status: int, body: object, level: str, said: str) -> None:
    with server(status, body) as url:
        (only,) = index(with_location(url))
    assert only.level == level and said in only.message + only.advice


def test_a_service_must_have_this_index(folder: Path) -> None:
    loaded = RetrieverService(top_k=3)
    loaded.open(index_passages([Passage("1", "A", "text")], EncoderConfig(kind="bm25")), 1)
    with served(make_app(loaded)) as url:
        (other,) = index(with_location(f"retriever+{url}"))
        assert other.level == "error" and "serves the index" in other.message
        assert loaded.index is not None
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace("d" * 64, loaded.index.digest))
        (same,) = index(with_location(f"retriever+{url}"))
        assert same.level == "ok"
    loaded.close()
    assert index(with_location(f"retriever+{NOWHERE}")) == []
