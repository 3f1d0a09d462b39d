"""Base job templates of Prefect's work pools, for our image: `python -m flows.work_pools docker --gpus 1`.

`flows.deploy` creates the pools with them. The files in infra/work-pools are Prefect's own templates with our
defaults. A pool with GPUs differs from one without by a single default, so there is one file a type and the
number is put in here.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dgpo_core.errors import UserError
from tasks.stage import main as run_program

FOLDER = Path(__file__).resolve().parents[1] / "infra" / "work-pools"


class Kind(StrEnum):
    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


def template(kind: Kind, gpus: int = 0) -> dict[str, Any]:
    """The base job template of a pool whose runs get `gpus` GPUs each. Raises UserError."""
    loaded: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8"))
    variables = loaded["variables"]["properties"]
    match kind:
        case Kind.PROCESS if gpus:
            raise UserError(
                "a process pool gives its runs the GPUs of the worker: set CUDA_VISIBLE_DEVICES there"
            )
        case Kind.DOCKER if gpus:
            variables["device_requests"]["default"] = [{"count": gpus, "capabilities": [["gpu"]]}]
        case Kind.KUBERNETES:
            variables["gpus"]["default"] = gpus
    return loaded


def show(
    kind: Annotated[Kind, typer.Argument(help="type of the pool")],
    gpus: Annotated[int, typer.Option(min=0, help="for each run")] = 0,
) -> None:
    """Print the base job template of a work pool."""
    print(json.dumps(template(kind, gpus), indent=2))


if __name__ == "__main__":
    run_program(lambda: typer.run(show))
