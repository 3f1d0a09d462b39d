"""Where a published file is: on this machine, or on the Hugging Face hub, which is asked for it once."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dgpo_core.errors import InfrastructureError, UserError, first_line
from dgpo_core.hub import HTTP_ERROR

SCHEME = "hf://"
_HUB = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


@dataclass(frozen=True)
class Fetched:
    """`path` is the file on this machine, `origin` where it came from: on the hub with the commit."""

    path: Path
    origin: str


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub; `revision` None is the newest."""

    repository: str
    file: str
    revision: str | None


def hub_file(place: str, setting: str) -> HubFile | None:
    """What `hf://datasets/<owner>/<name>[@<revision>]/<path>` names; None for a path on this machine.

    Raises UserError naming `setting` for what is neither.
    """
    if not place.startswith(SCHEME):
        return None
    if not (match := _HUB.fullmatch(place)):
        raise UserError(f"{setting}: {place}: must be hf://datasets/<owner>/<name>[@<revision>]/<path>")
    return HubFile(match["repository"], match["file"], match["revision"])


def fetch(place: str, setting: str) -> Fetched:
    """The file at `place`, as `hub_file` reads it.

    What is on the hub goes to the hub's own cache (HF_HOME), is there for the next time, and a broken
    download continues. Raises UserError naming `setting` when there is no such file, InfrastructureError
    when the hub cannot be reached.
    """
    wanted = hub_file(place, setting)
    if wanted is None:
        path = Path(place)
        if not path.is_file():
            raise UserError(f"{setting}: {place}: no such file")
        return Fetched(path, place)
    repository, file = wanted.repository, wanted.file
    try:
        path = Path(hf_hub_download(repository, file, repo_type="dataset", revision=wanted.revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(f"{setting}: {place}: {first_line(error)}") from error
    except LocalEntryNotFoundError as error:  # not in the cache, and no answer from the hub
        raise InfrastructureError(f"{setting}: {place}: cannot reach the hub: {first_line(error)}") from error
    except EntryNotFoundError as error:
        raise UserError(f"{setting}: {place}: no such file there: {first_line(error)}") from error
    except (HTTP_ERROR, OSError, RuntimeError) as error:  # RuntimeError: the hub's storage Xet
        raise InfrastructureError(f"{setting}: {place}: the download failed: {first_line(error)}") from error
    return Fetched(path, f"{SCHEME}datasets/{repository}@{_commit(path)}/{file}")


def _commit(path: Path) -> str:
    """The hub's cache keeps a file below datasets--<owner>--<name>/snapshots/<commit>/."""
    cached = max(place for place, part in enumerate(path.parts) if part.startswith("datasets--"))
    return path.parts[cached + 2]
