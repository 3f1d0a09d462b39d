"""What is on a Qdrant server of ours: listed, removed, kept as snapshots and restored from them."""

from dataclasses import dataclass
from typing import Any

from qdrant_client import QdrantClient, models

from dgpo_core.errors import UserError

OURS = "dgpo"  # key of a collection's metadata


@dataclass(frozen=True)
class Collection:
    """`alias` is how readers know it, None when they use another one; `digest` names what is searched."""

    name: str
    alias: str | None
    points: int
    status: str
    digest: str


def describe_ours(digest: str, points: int, settings: dict[str, str | int]) -> dict[str, Any]:
    """The metadata by which a collection is known as ours."""
    return {OURS: {"digest": digest, "points": points, **settings}}


def list_collections(client: QdrantClient) -> list[Collection]:
    """Ours, by name; other programs' collections are left out."""
    aliases = {alias.collection_name: alias.alias_name for alias in client.get_aliases().aliases}
    found = []
    for name in sorted(collection.name for collection in client.get_collections().collections):
        info = client.get_collection(name)
        about = (info.config.metadata or {}).get(OURS)
        if about:
            points = info.points_count or 0
            found.append(Collection(name, aliases.get(name), points, str(info.status), about["digest"]))
    return found


def remove_collection(client: QdrantClient, name: str) -> None:
    """Raises UserError for one that readers use, or that is not ours."""
    found = {collection.name: collection for collection in list_collections(client)}
    if name not in found:
        raise UserError(f"{name}: no collection of this pipeline; there are {', '.join(found) or 'none'}")
    if alias := found[name].alias:
        raise UserError(
            f"{name}: readers use it, as {alias}; it is removable when another one has that alias"
        )
    client.delete_collection(name)


def snapshot_collection(client: QdrantClient, name: str) -> models.SnapshotDescription:
    """One file on the server with everything: vectors, payloads and index. Takes as long as copying it."""
    made = client.create_snapshot(name, wait=True)
    if made is None:
        raise UserError(f"{name}: the server has made no snapshot; see its log")
    return made


def restore_collection(client: QdrantClient, name: str, source: str) -> None:
    """Make collection `name` of a snapshot: file:///... as the server sees it, or a URL that it can fetch."""
    client.recover_snapshot(name, location=source, priority=models.SnapshotPriority.SNAPSHOT, wait=True)
