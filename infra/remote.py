"""Outputs to and from DVC's remote: `python -m infra.remote push` or `pull` (`make push`, `make pull`).

`dvc push --run-cache` and `dvc pull --run-cache`, after a look whether there is such a remote: without one,
`dvc pull` lists every output as missing and does not say that nobody has pushed.
"""

import typer
from dvc.cli import main as dvc
from dvc.exceptions import DvcException
from dvc.repo import Repo

from dgpo_core.errors import UserError
from tasks.stage import main as run_program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)


@app.command()
def push() -> None:
    """Send what dvc.lock names, and what stages made before, to the default remote."""
    address, _ = _remote()
    _dvc("push", "--run-cache")
    print(f"pushed to {address}")


@app.command()
def pull() -> None:
    """Get what dvc.lock names, and what stages made before, from the default remote."""
    address, missing = _remote()
    if missing:
        raise UserError(
            f"{address}: nothing was pushed to this DVC remote: run `make push` where the outputs are, name another "
            "remote (docs/operations.md), or make the outputs here (`make demo`)"
        )
    _dvc("pull", "--run-cache")


def _remote() -> tuple[str, bool]:
    """(address of the default remote, whether it is a folder that is not there). Raises UserError."""
    try:
        with Repo() as repo:
            remote = repo.cloud.get_remote()
            local = remote.fs.protocol == "local"
            return str(remote.path), local and not remote.fs.exists(remote.path)
    except DvcException as error:
        raise UserError(f"DVC: {' '.join(str(error).split())}") from error


def _dvc(*arguments: str) -> None:
    if code := dvc(list(arguments)):
        raise typer.Exit(int(code))


if __name__ == "__main__":
    run_program(app)
