"""MLflow's store: whole, at home, writable; and our experiment there, in a file or on a server."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx

from dgpo_core.config.params import Params
from dgpo_core.errors import without_credentials
from tasks.commands.checks.finding import Finding, error, ok, warning
from tasks.tracking.store import (
    EXPERIMENT,
    LOGIN,
    artifact_root,
    complaint,
    condition,
    deleted_experiment,
    local_folder,
    local_path,
    moved_from,
    tracking_uri,
)

TIMEOUT = 5.0
SUBJECT, PLACES, NAMED = "MLflow's store", "MLflow's artifacts", f"MLflow's experiment {EXPERIMENT}"


def store(_params: Params) -> list[Finding]:
    """The store that a stage would use now. A server that does not answer is the services' finding."""
    uri = tracking_uri()
    path = local_path(uri)
    if path is not None:
        try:
            return _file(path)
        except (OSError, sqlite3.Error) as why:
            return [error(SUBJECT, f"{path}: {why}", "see who owns the file and what else uses it")]
    return _server(uri) if uri.startswith(("http://", "https://")) else []


def _file(path: Path) -> list[Finding]:
    folder = path.parent
    if condition(path) == "absent":
        if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
            return [
                error(SUBJECT, f"{folder} cannot be written", "runs would not be recorded: change its owner")
            ]
        return [ok(SUBJECT, f"{path}: made by the first run")]
    if trouble := complaint(path):
        return [error(SUBJECT, *trouble)]
    if not (os.access(path, os.W_OK) and os.access(folder, os.W_OK)):
        advice = "runs are not recorded: change the owner of file and folder"
        return [error(SUBJECT, f"{path} cannot be written", advice)]
    return [ok(SUBJECT, f"{path}, whole"), *_experiment(path), _places(path)]


def _experiment(path: Path) -> list[Finding]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as opened:
        query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
        row = opened.execute(query, (EXPERIMENT,)).fetchone()
    return [_state(*row)] if row else [_none()]


def _state(number: object, stage: str) -> Finding:
    if stage == "active":
        return ok(NAMED, "active")
    message, _, command = str(deleted_experiment(str(number))).partition(": ")
    return error(NAMED, f"{message}; nothing is recorded", command)


def _none() -> Finding:
    return ok(NAMED, "made by the first run (an earlier one may have been renamed)")


def _places(path: Path) -> Finding:
    """Whether artifacts go to the folder beside the store, and may be written there."""
    home = artifact_root(path)
    if old := moved_from(path):
        advice = f"the next start takes those that are in {home} from there, and writes there"
        return warning(PLACES, f"the store was copied or moved here; it names {old}", advice)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as opened:
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        row = opened.execute(query, (EXPERIMENT,)).fetchone()
    folder = local_folder(row[0]) if row else home
    if folder is None:
        return ok(PLACES, without_credentials(row[0]))
    there = folder if folder.exists() else folder.parent
    if not os.access(there, os.W_OK):
        return error(PLACES, f"{folder} cannot be written", "change its owner")
    if folder != home:
        advice = f"to have them beside the store: mv {folder} {home}, and start anything"
        return warning(PLACES, f"{folder}, which is not beside the store", advice)
    return ok(PLACES, str(folder))


def _server(uri: str) -> list[Finding]:
    shown = without_credentials(uri.partition("?")[0]).rstrip("/")
    login = (os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    try:
        answer = httpx.get(
            f"{uri.partition('?')[0].rstrip('/')}/api/2.0/mlflow/experiments/get-by-name",
            params={"experiment_name": EXPERIMENT},
            auth=login if any(login) else None,
            headers={"Authorization": f"Bearer {token}"} if token and not any(login) else {},
            timeout=TIMEOUT,
        )
        body = answer.json() if answer.status_code in (200, 404) else {}
    except (httpx.HTTPError, httpx.InvalidURL):
        return []
    except ValueError:
        body = {}
    if answer.status_code in (401, 403):
        return [error(NAMED, f"{shown} refuses ({answer.status_code})", LOGIN)]
    if isinstance(body, dict) and "experiment" in body:
        found = body["experiment"]
        return [_state(found.get("experiment_id"), found.get("lifecycle_stage", "active"))]
    if isinstance(body, dict) and body.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return [_none()]
    advice = "see whether MLFLOW_TRACKING_URI is the address of an MLflow server"
    return [error(NAMED, f"{shown} answers {answer.status_code} and is not understood", advice)]
