"""What stands in the way at MLflow's store or server, as one line that says what to do. Imports no MLflow."""

import os
import re
import time

import httpx

from dgpo_core.errors import InfrastructureError, UserError, first_line, without_credentials
from tasks.mlflow_store import EXPERIMENT, STORE, local_path, tracking_uri

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
                "start it (`make up`), or correct or unset MLFLOW_TRACKING_URI"
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
    """What a failure may come of: a server of another MLflow than this one."""
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
    """A command for the store in use, to be pasted; MLflow's own default is `mlflow.db` where one is."""
    uri = tracking_uri()
    if local_path(uri) == STORE.resolve():
        return text
    return f"MLFLOW_TRACKING_URI={_without_secrets(uri)} {text}"


def _without_secrets(text: str) -> str:
    for name in SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "...")
    return without_credentials(text)
