"""Run what is started from the Prefect dashboard: `dgpo worker cpu` in the project's folder.

Prefect's own worker, told of the server, the checkout and the pool; this process becomes it.
"""

import os
import sys
from pathlib import Path

from prefect import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from dgpo_core.errors import UserError
from flows.remote import POOL_VARIABLE
from flows.server import API_URL, answers_of, running_server
from flows.workspace import PUSH_VARIABLE, ROOT_VARIABLE, project_root
from tasks.commands.cli import run_as
from tasks.project import servers as services


def work(pool: str, runs: int, push: bool | None, prefect_port: int | None) -> None:
    """Become the worker of a pool, until Ctrl-C: `dgpo worker`."""
    url, root, name = running_server(prefect_port), project_root(), f"{pool}-pool"
    with temporary_settings({PREFECT_API_URL: url}), answers_of(url), get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            raise UserError(f"{url} has no work pool {name}: run `dgpo deploy` first") from None
    given = {API_URL: url, ROOT_VARIABLE: str(root), POOL_VARIABLE: pool}
    given |= {} if push is None else {PUSH_VARIABLE: str(int(push))}
    # DVC starts the `python` that comes first
    given["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    os.environ.update(given)
    mlflow = services.read("mlflow")
    if mlflow and os.environ.get(mlflow.variable) == mlflow.address:
        del os.environ[mlflow.variable]  # each run finds it when it starts: it may have moved
    os.execv(
        sys.executable,
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", name, "--limit", str(runs)],
    )


if __name__ == "__main__":
    run_as("worker", work)
