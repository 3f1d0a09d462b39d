"""The index of this working tree: its files, and whether what searches it elsewhere has the same one."""

import json
import os
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.config.params import Params
from dgpo_core.config.retrieval import parse_location
from tasks.commands.checks.finding import Finding, error, ok, warning
from tasks.project.paths import INDEX

TIMEOUT = 5.0
SUBJECT = "index"
AGAIN = "make it again: dvc repro --force index"


def index(params: Params) -> list[Finding]:
    """Of a server that does not answer the services' finding tells."""
    path = INDEX / "manifest.json"
    if not path.is_file():
        return [ok(SUBJECT, f"{INDEX} is made by the stage index")]
    try:
        manifest = json.loads(path.read_bytes())
        passages, digest, shards = manifest["passages"], manifest["digest"], manifest["shards"]
    except (OSError, ValueError, KeyError, TypeError) as why:
        return [error(SUBJECT, f"{path} is not an index's manifest ({why})", AGAIN)]
    kind, url = parse_location(params.retrieval.location)
    if kind == "server":
        return _collection(url, manifest, params.retrieval.hybrid)
    if kind == "service":
        return _service(url, digest)
    return [_shards(shards, passages)]


def _shards(shards: list[str], passages: int) -> Finding:
    """What Qdrant's engine inside the stages is filled from."""
    rows = 0
    for shard in shards:
        try:
            rows += pq.read_metadata(INDEX / shard).num_rows
        except (OSError, pa.ArrowInvalid) as why:
            return error(
                SUBJECT, f"{INDEX / shard} cannot be read ({' '.join(str(why).split())[:100]})", AGAIN
            )
    if rows != passages:
        return error(SUBJECT, f"{INDEX} has {rows:,} passages, its manifest says {passages:,}", AGAIN)
    return ok(SUBJECT, f"{passages:,} passages in {INDEX}")


def _collection(url: str, manifest: dict[str, Any], hybrid: bool) -> list[Finding]:
    """The collection on a Qdrant server; a hybrid one has a name that only the index's own code makes."""
    key = os.environ.get("QDRANT_API_KEY")
    headers = {"api-key": key} if key else {}
    name = manifest["collection"]
    if hybrid:
        return []
    status, body = _get(f"{url}/collections/{name}", headers)
    if status is None:
        return []
    if status in (401, 403):
        return [error(SUBJECT, f"{url} refuses ({status})", "set QDRANT_API_KEY")]
    later = "the next stage that searches loads it, or: dgpo collections build"
    if status != 200:
        return [warning(SUBJECT, f"{url} has no collection {name} yet ({status})", later)]
    points = (body.get("result") or {}).get("points_count")
    if points != manifest["passages"]:
        text = f"{name} at {url} has {points} points, the index {manifest['passages']}"
        return [warning(SUBJECT, text, later)]
    return [ok(SUBJECT, f"{points:,} points in {name} at {url}")]


def _service(url: str, digest: str) -> list[Finding]:
    status, body = _get(f"{url}/health", {})
    theirs = body.get("index")
    if status != 200 or theirs is None:
        return []  # loading, or a server that does not say what it has
    if theirs != digest:
        advice = "serve this one there (dgpo retriever), or run the stage index for that one"
        return [error(SUBJECT, f"{url} serves the index {theirs[:12]}, {INDEX} is {digest[:12]}", advice)]
    return [ok(SUBJECT, f"{url} serves {digest[:12]}, as {INDEX} says")]


def _get(url: str, headers: dict[str, str]) -> tuple[int | None, dict[str, Any]]:
    """Status and JSON object of an answer; None where there is none."""
    try:
        answer = httpx.get(url, headers=headers, timeout=TIMEOUT)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None, {}
    try:
        body = answer.json()
    except ValueError:
        body = {}
    return answer.status_code, body if isinstance(body, dict) else {}
