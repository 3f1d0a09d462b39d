"""Base job templates of Prefect's work pools, for our image.

The files in infra/work-pools are Prefect's own templates with our defaults. A pool with GPUs differs from one
without by a single default, so there is one file a type and the number is put in here. Nothing of Prefect is
imported: it keeps the settings that it finds at its first import.
"""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "infra" / "work-pools"
TAG = "dgpo"  # of what is ours on a server; pools have no tags: their description begins with it


class Kind(StrEnum):
    """Prefect's types of work pools for which there is a template."""

    PROCESS = "process"
    DOCKER = "docker"
    KUBERNETES = "kubernetes"


def job_template(kind: Kind, gpus: int = 0) -> dict[str, Any]:
    """Return the base job template of a pool whose runs get `gpus` GPUs each. Raises UserError."""
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
