"""Send outputs to DVC's remote and get them from there: `dgpo push` and `dgpo pull`.

They are `dvc push` and `dvc pull` with two additions. Without a remote `dvc pull` lists every output as
missing and does not say that nobody has pushed. And `dvc push --run-cache` sends the records of earlier runs,
not their outputs, so that nobody else can go back to them.
"""

import sys
from contextlib import suppress

from dvc.cli import main as dvc
from dvc.exceptions import CollectCacheError, DvcException
from dvc.repo import Repo

from dgpo_core.errors import UserError
from tasks.commands.cli import run_as
from tasks.project.dvc import require_dvc


def push(history: bool) -> None:
    """Send what dvc.lock names to the default remote, and with `history` the outputs of all earlier runs."""
    address, _ = _remote()
    _dvc("push", "--run-cache")
    if history:
        _push_history()
    print(f"pushed to {address}")


def pull() -> None:
    """Get what dvc.lock names from the default remote; `dvc repro --pull` gets earlier runs' outputs."""
    address, missing = _remote()
    if missing:
        raise UserError(
            f"{address}: nothing was pushed to this DVC remote: run `dgpo push` where the outputs are, name "
            "another remote (docs/team.md), or make the outputs here (`make demo`)"
        )
    _dvc("pull", "--run-cache")


def _remote() -> tuple[str, bool]:
    """Return the default remote's address, and whether it is a folder that is not there. Raises UserError."""
    require_dvc()
    try:
        with Repo() as repo:
            remote = repo.cloud.get_remote()
            local = remote.fs.protocol == "local"
            return str(remote.path), local and not remote.fs.exists(remote.path)
    except DvcException as error:
        raise UserError(f"DVC: {' '.join(str(error).split())}") from error


def _push_history() -> None:
    """Send the outputs of every run on record, as far as `dvc gc` has left them."""
    with Repo() as repo:
        found = set()
        for record in repo.stage_cache.push(None):
            with suppress(CollectCacheError):
                for objects in repo.stage_cache.get_used_objs([record]).values():
                    found |= {item for item in objects if repo.cache.local.exists(item.value)}
        if repo.cloud.push(found).failed:
            raise UserError("some outputs of earlier runs could not be sent to the DVC remote; try again")


def _dvc(*arguments: str) -> None:
    if code := dvc(list(arguments)):
        raise SystemExit(int(code))


if __name__ == "__main__":
    command = sys.argv.pop(1)
    run_as(command, push if command == "push" else pull)
