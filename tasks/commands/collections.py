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
    """Print the collections: points, status, and whether readers use them."""
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
    """Load, index and measure the collection and give it the alias, as the first stage that needs it does."""
    _, params = _server()
    index = retriever(params)
    print(f"index {index.digest[:12]} is searched at {params.retrieval.location}")


def remove(name: str) -> None:
    """Delete a collection that no reader uses."""
    client, _ = _server()
    remove_collection(client, name)
    print(f"removed {name}")


def snapshot() -> None:
    """Make a snapshot of the collection that this working tree's readers use."""
    client, params = _server()
    name = _name(params)
    if not client.collection_exists(name):
        raise UserError(f"{name}: not on this server yet; dgpo collections build makes it")
    file = snapshot_collection(client, name)
    print(f"{params.retrieval.location}/collections/{name}/snapshots/{file.name} ({file.size:,} bytes)")


def restore(source: str) -> None:
    """Bring the collection back from a snapshot, and give it the alias."""
    client, params = _server()
    restore_collection(client, _name(params), source)
    build()


def _server() -> tuple[QdrantClient, Params]:
    """Connect to the server of params.yaml. Raises UserError when the index is not on a Qdrant server."""
    params = load_params()
    location = parse_location(params.retrieval.location)
    if location.kind != "server":
        raise UserError(f"retrieval.location: {params.retrieval.location} is no Qdrant server")
    return connect(location.address, params.retrieval.qdrant), params


def _name(params: Params) -> str:
    name = content_name(read_manifest(INDEX), params.retrieval.hybrid)
    return collection_name(name, params.retrieval.qdrant)
