"""MLflow's store: a local sqlite file that is whole or not there, or a server that answers in seconds.

`prepare` is called before anything opens a local store. MLflow itself would make the tables in the calling
process, which may be killed in the middle of it, and would look for artifacts where the store once was. What
stands in the way at a store or server is told in one line that says what to do. Nothing here imports MLflow,
except the process that makes a store.
"""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import quote
from urllib.request import url2pathname

import httpx
from filelock import FileLock

from dgpo_core.errors import InfrastructureError, UserError, first_line, without_credentials

EXPERIMENT = "dgpo"
STORE, ARTIFACTS = Path("mlflow.db"), "mlruns"
SQLITE = "sqlite:///"
STORE_PATIENCE = 300.0  # seconds to wait for another process that makes the store
BUSY = 20.0  # seconds to wait for another process that writes, as MLflow does
# Where MLflow keeps places of artifacts: table, its key, column.
PLACES = (
    ("runs", "run_uuid", "artifact_uri"),
    ("model_versions", "rowid", "source"),
    ("model_versions", "rowid", "storage_location"),
    ("logged_models", "rowid", "artifact_location"),
    ("trace_tags", "rowid", "value"),
)

Condition = Literal["absent", "whole", "half-made", "older", "newer", "foreign"]


def tracking_uri() -> str:
    """Return where runs are recorded."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{STORE.resolve()}"


def local_path(uri: str) -> Path | None:
    """Return the file of an sqlite store; None for a server, another database, or one in memory."""
    name = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(name).absolute() if uri.startswith(SQLITE) and name not in ("", ":memory:") else None


def artifact_root(path: Path) -> Path:
    """Return the folder for the artifacts of the store `path`, whatever directory a program works in."""
    return path.resolve().parent / ARTIFACTS


def prepare(uri: str) -> None:
    """Make a local store that is not there yet, and bring one that was copied or moved to where it is now.

    Nothing is done about servers. Raises UserError for a store that cannot be used, with the cure, and
    InfrastructureError when it cannot be read or written.
    """
    path = local_path(uri)
    if path is None:
        return
    if "?" in (place := str(STORE.resolve())) and uri == f"{SQLITE}{place}":
        cure = "rename it, or name another store (MLFLOW_TRACKING_URI)"
        raise UserError(f"{place}: a database's address ends at a ?, which this folder's name has: {cure}")
    try:
        if condition(path) == "absent":
            _make(path)
        if trouble := complaint(path):
            raise UserError(": ".join(trouble))
        if moved_from(path):
            with _alone(path):
                _settle(path)
    except (OSError, sqlite3.Error, NotImplementedError) as error:  # the last: a disk without locks
        raise InfrastructureError(f"{path}: MLflow's store cannot be used here: {error}") from error


def condition(path: Path) -> Condition:
    """Say how far a store has been made, by its schema. Raises OSError or sqlite3.Error if it cannot be read.

    MLflow writes its first experiment when all tables are there: without one nothing was ever recorded.
    """
    if not path.exists() or path.stat().st_size == 0:
        return "absent"
    try:
        with closing(_reading(path)) as store:
            tables = _tables(store)
            if not tables:
                return "absent"
            if not tables >= {"experiments", "runs"}:
                return "foreign"
            revision = _first(store, "SELECT version_num FROM alembic_version", "alembic_version" in tables)
            recorded = _first(store, "SELECT 1 FROM experiments") or _first(store, "SELECT 1 FROM runs")
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return "foreign"
    head, known = revisions()
    if head in (None, revision):
        return "whole"
    if not recorded:
        return "half-made"
    return "older" if revision is None or revision in known else "newer"


def complaint(path: Path) -> tuple[str, str] | None:
    """Return what is wrong with a store and the cure; None for one that can be used, or made."""
    backup = f"cp {path} {path}.old"
    match condition(path):
        case "half-made":
            what = "MLflow's store was never finished (its maker was killed) and nothing is recorded in it"
            return f"{path}: {what}", f"rm {path}; the next start makes it anew"
        case "older":
            what = "MLflow's store is of an older MLflow than the installed one"
            return f"{path}: {what}", f"end what uses it, then {backup} && mlflow db upgrade {SQLITE}{path}"
        case "newer":
            what = "MLflow's store is of a newer MLflow than the installed one"
            return f"{path}: {what}", "install that MLflow, or name another store (MLFLOW_TRACKING_URI)"
        case "foreign":
            cure = "move it away, or name another store (MLFLOW_TRACKING_URI)"
            return f"{path}: this is no store of MLflow's", cure
    return None


def moved_from(path: Path) -> str | None:
    """Return where a whole store has its artifacts, if that was beside it before it was copied or moved.

    None when they are beside it, on a server, or in a folder that was chosen for them.
    """
    home = artifact_root(path)
    with closing(_reading(path)) as store:
        place = _first(store, "SELECT artifact_location FROM experiments WHERE name = ?", True, EXPERIMENT)
        old = local_folder(place)
        if place is None or old is None or old.resolve() == home.resolve():  # it may be a link
            return None
        runs = [run for run, _ in _within(store, "runs", "run_uuid", "artifact_uri", place)]
    anothers = (old.parent / STORE.name).is_file() or not old.exists()
    return place if anothers or not runs or any((home / run).exists() for run in runs) else None


def local_folder(place: str | None) -> Path | None:
    """Return the folder that a place of artifacts names on this machine; None for one elsewhere."""
    if place is None or not place.startswith(("file:", "/")):
        return None
    return Path(url2pathname(re.sub(r"^file:(//)?", "", place)))


@cache
def revisions() -> tuple[str | None, frozenset[str]]:
    """Return the installed MLflow's newest schema and all that it knows; (None, none) if it tells of none.

    Read from its migrations, which is a hundred times faster than to import it.
    """
    found = find_spec("mlflow")
    places = list(found.submodule_search_locations or ()) if found else []
    scripts = [file for place in places for file in Path(place, "store/db_migrations/versions").glob("*.py")]
    texts = [script.read_text(encoding="utf-8") for script in scripts]
    known = {name for text in texts for name in re.findall(r'^revision = "(\w+)"', text, re.MULTILINE)}
    before = {name for text in texts for name in re.findall(r'^down_revision = "(\w+)"', text, re.MULTILINE)}
    heads = known - before
    return (heads.pop() if len(heads) == 1 else None), frozenset(known)


def _make(path: Path) -> None:
    """Make the store in a folder beside it and rename it: a kill at any moment leaves none or a whole one.

    A child makes it, which is waited for: its end is the proof that nothing is written any more.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if condition(path) != "absent":
            return  # another process was faster
        for left in path.parent.glob(f"{path.name}-making-*"):  # of a killed one: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}-making-", dir=path.parent) as folder:
            new = Path(folder) / path.name
            command = [sys.executable, "-m", "tasks.tracking.store", str(new), artifact_root(path).as_uri()]
            sources = str(Path(__file__).resolve().parents[2])
            paths = os.pathsep.join([sources, *filter(None, [os.environ.get("PYTHONPATH")])])
            env = {**os.environ, "PYTHONPATH": paths}
            # in the store's folder: MLflow's own first experiment is kept relative to it
            done = subprocess.run(
                command, cwd=path.parent, env=env, capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                raise InfrastructureError(f"{path}: MLflow's store cannot be made: {last}")
            os.replace(new, path)


def _fill(path: Path, artifacts: str) -> None:
    """Make the tables and our experiment (in the child)."""
    from mlflow import MlflowClient

    MlflowClient(f"{SQLITE}{path}").create_experiment(EXPERIMENT, artifacts)


def _settle(path: Path) -> None:
    """Rewrite the places of artifacts to the folder beside the store, in one transaction.

    A run whose artifacts are still in the old folder alone, which is another store's by now, keeps its place.
    """
    if (place := moved_from(path)) is None:
        return
    home, old = artifact_root(path), local_folder(place)
    assert old is not None, "moved_from() tells of local folders only"
    with closing(sqlite3.connect(path, timeout=BUSY)) as store, store:
        tables = _tables(store)
        for table, key, column in PLACES:
            if table not in tables:
                continue
            for row, there in _within(store, table, key, column, place):
                here = home.as_uri() + there.removeprefix(place)
                before, now = local_folder(there), local_folder(here)
                if before and now and (now.exists() or (home.exists() and not before.exists())):
                    store.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (here, row))
        for prefix, new in ((place, home.as_uri()), (str(old), str(home))):  # MLflow's own: a plain path
            for row, there in _within(store, "experiments", "experiment_id", "artifact_location", prefix):
                new_place = new + there.removeprefix(prefix)
                update = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
                store.execute(update, (new_place, row))
    said = f"note: {path.name} was copied or moved here from {old.parent}: artifacts are now kept in {home}"
    with suppress(OSError):  # nobody may be reading any more
        print(said, file=sys.stderr, flush=True)


def _tables(store: sqlite3.Connection) -> set[str]:
    return {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _within(
    store: sqlite3.Connection, table: str, key: str, column: str, place: str
) -> list[tuple[str, str]]:
    """Return (key, place) of the rows whose place is `place` or below it."""
    rows = store.execute(
        f"SELECT {key}, {column} FROM {table} WHERE {column} = ? OR substr({column}, 1, ?) = ?",
        (place, len(place) + 1, f"{place}/"),
    )
    return [(row[0], row[1]) for row in rows]


def _first(store: sqlite3.Connection, query: str, wanted: bool = True, *values: str) -> str | None:
    row = store.execute(query, values).fetchone() if wanted else None
    return None if row is None else row[0]


def _reading(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=BUSY)


def _alone(path: Path) -> FileLock:
    """Return the lock of who makes or moves the store; the kernel frees that of a process that is killed."""
    return FileLock(path.with_name(f"{path.name}.lock"), timeout=STORE_PATIENCE)


PATIENCE = 3.0  # seconds that a server has to answer
ATTEMPTS = 3  # of a server that refuses connections: it may just be starting
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask for the permission"


def require_answer(uri: str) -> None:
    """Raise InfrastructureError in seconds when no server answers: MLflow's client would try for longer."""
    if not uri.startswith(("http://", "https://")):
        return
    address = without_credentials(uri.partition("?")[0]).rstrip("/")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            httpx.get(f"{address}/health", timeout=PATIENCE, follow_redirects=True)
        except (httpx.HTTPError, httpx.InvalidURL) as why:
            if attempt < ATTEMPTS and isinstance(why, httpx.ConnectError):
                time.sleep(0.5)
                continue
            raise InfrastructureError(
                f"MLflow's server {address} does not answer ({first_line(why) or type(why).__name__}): "
                "start it (`dgpo up`), or correct or unset MLFLOW_TRACKING_URI"
            ) from None
        return


def deleted_experiment(number: str) -> UserError:
    """Say that the experiment was deleted, by whomever: to bring it back is for people to decide."""
    restore = _command(f"mlflow experiments restore -x {number}")
    return UserError(f"the experiment {EXPERIMENT} was deleted in MLflow: {restore}")


def explained(error: Exception) -> UserError | InfrastructureError:
    """Return what MLflow, its database or the network raised, in a line, without passwords."""
    if isinstance(error, UserError | InfrastructureError):
        return error
    text = _without_secrets(" ".join((str(error).strip() or type(error).__name__).split("\n")[0].split()))
    if found := re.search(r"[Tt]he experiment (\d+) must be in the 'active' state", text):
        return deleted_experiment(found[1])
    if found := re.search(r"[Tt]he run (\w+) must be in the 'active' state", text):
        restore = _command(f"mlflow runs restore --run-id {found[1]}")
        return UserError(f"the run {found[1]} was deleted in MLflow: {restore}")
    if found := re.search(r"Run with id=(\w+) not found", text):
        return UserError(
            f"the run {found[1]} is gone from MLflow: if a version was registered with it, delete that "
            "version on MLflow's page of the model, then `dgpo register`"
        )
    uri = tracking_uri()
    shown = _without_secrets(uri.partition("?")[0])
    code = getattr(error, "error_code", "")
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED") or re.search(r"error code 40[13]\b", text):
        return UserError(f"MLflow's server {shown} refuses: {text}: {LOGIN}")
    return InfrastructureError(f"MLflow's store {shown} failed: {text}{_other_version(uri)}")


def _other_version(uri: str) -> str:
    """Say whether a failure may come of a server of another MLflow than this one."""
    if not uri.startswith("http"):
        return ""
    from importlib.metadata import version

    address = without_credentials(uri.partition("?")[0]).rstrip("/")
    try:
        theirs = httpx.get(f"{address}/version", timeout=PATIENCE).text.strip()
    except (httpx.HTTPError, httpx.InvalidURL):
        return ""
    ours = version("mlflow")
    if not re.fullmatch(r"\d+\.\d+\S{0,20}", theirs):
        return f" (is {address} an MLflow server?)"
    return "" if theirs == ours else f" (the server is MLflow {theirs}, this is {ours})"


def _command(text: str) -> str:
    """Write a command for the store in use, to be pasted; MLflow's own default is `mlflow.db`."""
    uri = tracking_uri()
    if local_path(uri) == STORE.resolve():
        return text
    return f"MLFLOW_TRACKING_URI={_without_secrets(uri)} {text}"


def _without_secrets(text: str) -> str:
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "...")
    return without_credentials(text)


if __name__ == "__main__":
    _fill(Path(sys.argv[1]), sys.argv[2])
