"""`dgpo collections`: the collections that the pipeline has made on its Qdrant server."""

from qdrant_client import QdrantClient

from dgpo_core.config.params import Params, load_params
from dgpo_core.config.retrieval import parse_location
from dgpo_core.errors import UserError
from dgpo_core.retrieval.collection import content_name
from dgpo_core.retrieval.qdrant_server import (
    collection_name,
    connect,
    list_collections,
    remove_collection,
    restore_collection,
    snapshot_collection,
)
from dgpo_core.retrieval.shards import read_manifest
from tasks.project.paths import INDEX
from tasks.stages.inputs import retriever


def show() -> None:
    client, _ = _server()
    found = list_collections(client)
    if not found:
        print("no collections of this pipeline")
        return
    rows = [("collection", "points", "status", "readers")]
    rows += [(c.name, f"{c.points:,}", c.status, c.alias or "none: removable") for c in found]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def build() -> None:
    """What the first stage that needs it would do: load, index, measure, give the alias to it."""
    _, params = _server()
    made = retriever(params)
    print(f"index {made.digest[:12]} is searched at {params.retrieval.location}")


def remove(name: str) -> None:
    client, _ = _server()
    remove_collection(client, name)
    print(f"removed {name}")


def snapshot() -> None:
    """Of the collection that this working tree's readers use."""
    client, params = _server()
    name = _wanted(params)
    if not client.collection_exists(name):
        raise UserError(f"{name}: not on this server yet; dgpo collections build makes it")
    made = snapshot_collection(client, name)
    print(f"{params.retrieval.location}/collections/{name}/snapshots/{made.name} ({made.size:,} bytes)")


def restore(source: str) -> None:
    client, params = _server()
    restore_collection(client, _wanted(params), source)
    build()


def _server() -> tuple[QdrantClient, Params]:
    """Raises UserError when the index is not on a Qdrant server."""
    params = load_params()
    location = parse_location(params.retrieval.location)
    if location.kind != "server":
        raise UserError(f"retrieval.location: {params.retrieval.location} is no Qdrant server")
    return connect(location.place, params.retrieval.qdrant), params


def _wanted(params: Params) -> str:
    name = content_name(read_manifest(INDEX), params.retrieval.hybrid)
    return collection_name(name, params.retrieval.qdrant)
