"""Models of the Hugging Face hub by name and revision; failures of the way to it apart from refusals."""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from dgpo_core.errors import InfrastructureError, UserError, first_line

# of the HTTP library that this version of huggingface_hub uses
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
NEWEST = "main"  # the branch that the hub gives where none is named


class HubModel(NamedTuple):
    """A model by its name on the hub, `owner/name`, and its commit, tag or branch."""

    name: str
    revision: str = NEWEST


def hub_model(source: str) -> HubModel:
    """Parse `owner/name[@revision]`, as data sets are written too; a folder's path is its name.

    Raise UserError for half of that.
    """
    name, at, revision = source.rpartition("@")
    if not at or Path(source).is_dir():
        return HubModel(source)
    if not name or not revision:
        raise UserError(f"{source}: write owner/name@revision, or owner/name for the newest")
    return HubModel(name, revision)


def cached_file(source: str, file: str) -> Path | None:
    """Return where a file of a model on the hub was downloaded to: .../snapshots/<commit>/<file>; or None."""
    try:
        name, revision = hub_model(source)
        found = try_to_load_from_cache(name, file, revision=revision)
    except (ValueError, UserError):  # not a name of the hub
        return None
    return Path(found) if isinstance(found, str) else None  # else: not there, or known not to exist


def load_error(what: str, error: Exception) -> InfrastructureError | UserError:
    """Return the error to raise where `what` ("x: cannot load a model") has failed by `error`."""
    text = f"{what}: {first_line(error)}"
    return InfrastructureError(text) if unreachable(error) else UserError(text)


def unreachable(error: BaseException) -> bool:
    """Return whether `error`, or its cause, is a connection that failed or a fault of the hub's own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError | ConnectionError):
            return True
        if isinstance(cause, HfHubHTTPError):  # the hub has answered
            return cause.response is not None and cause.response.status_code >= 500
        if isinstance(cause, HTTP_ERROR):
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False
