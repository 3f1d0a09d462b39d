"""What is on a Qdrant server: listed, removed, and brought back from a snapshot."""

import pytest
from qdrant_client import models

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.retrieval.qdrant_server import (
    collection_name,
    connect,
    ensure,
    list_collections,
    remove_collection,
    restore_collection,
    snapshot_collection,
)
from tests.dgpo_core.retrieval.conftest import dense_content
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer

OLD, NEW = QdrantConfig(quantization="binary"), QdrantConfig()


def test_the_old_one_can_be_removed_and_brought_back(qdrant: QdrantServer, passages: list[Passage]) -> None:
    made, _ = dense_content(passages[:12])
    client = connect(qdrant.url, NEW)
    stranger = models.VectorParams(size=2, distance=models.Distance.DOT)
    client.create_collection("somebody-elses", vectors_config=stranger)
    for config in (OLD, NEW):
        ensure(client, made, config, lambda *_: None, lambda name: None)
    old, new = (collection_name(made.name, config) for config in (OLD, NEW))
    found = {c.name: c for c in list_collections(client)}
    assert {name: c.alias for name, c in found.items()} == {old: None, new: made.name}
    assert {(c.points, c.status, c.digest) for c in found.values()} == {(12, "green", made.digest)}
    with pytest.raises(UserError, match=f"{new}: readers use it, as {made.name}"):
        remove_collection(client, new)
    with pytest.raises(UserError, match="somebody-elses: no collection of this pipeline"):
        remove_collection(client, "somebody-elses")
    kept = snapshot_collection(client, old)
    remove_collection(client, old)
    assert [c.name for c in list_collections(client)] == [new]
    restore_collection(client, old, f"file:///snapshots/{kept.name}")
    qdrant.requests.clear()
    ensure(client, made, OLD, lambda *_: None, lambda name: None)
    assert not qdrant.bodies(f"PUT /collections/{old}/points"), "nothing is uploaded again"
    assert {c.name: c.alias for c in list_collections(client)} == {old: made.name, new: None}
