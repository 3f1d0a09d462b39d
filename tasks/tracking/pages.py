"""What MLflow's pages show people of our experiment: descriptions, names of runs, and the table of pipelines.

MLflow keeps a shared view of the runs' table as a tag of the experiment, which an address names: so columns
and filter can be chosen for everybody.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx

from tasks.tracking.store import EXPERIMENT, PATIENCE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

NOTE = "mlflow.note.content"  # tag: a description, Markdown
SHARED, KEY = "mlflow.sharedViewState.", "dgpo"
EXPERIMENT_NOTE = (
    "Pipelines that train and evaluate search agents: a run each, below it one for each stage that was "
    "executed. A run is named after what was changed from its profile. Its description says what the stages "
    "did, the report is among the artifacts of the stage `report` (`reports/index.html`), and episodes are "
    "under *Traces*. Trained models are versions of `search-agent`."
)
MODEL_NOTE = (
    "Search agents that were trained here. `champion` is the one that was promoted, `challenger` the one "
    "that is offered, `previous` the champion before. `dgpo ask --model models:/search-agent@champion` asks "
    "one."
)
COLUMNS = (
    "tags.`changed`",
    "metrics.`em/dgpo/average`",
    "metrics.`em/kd/average`",
    "tags.`profile`",
    "tags.`seed`",
    "tags.`git.commit`",
)
VIEW = json.dumps({"searchFilter": "tags.kind = 'pipeline'", "selectedColumns": COLUMNS})
NAMED, LONGEST = 4, 24  # changes in a run's name, and characters of a value


def describe(client: "MlflowClient", experiment: "Experiment") -> None:
    """Give the experiment its description, unless somebody has written one, and its view of the runs."""
    from mlflow.exceptions import MlflowException

    tags = {SHARED + KEY: VIEW} | ({} if NOTE in experiment.tags else {NOTE: EXPERIMENT_NOTE})
    with suppress(MlflowException):  # who may write runs may not be allowed to change the experiment
        for key, value in tags.items():
            if experiment.tags.get(key) != value:
                client.set_experiment_tag(experiment.experiment_id, key, value)


def runs_address(server: str) -> str:
    """Return where a server shows the pipelines' runs; its own address where it has none yet, or is away."""
    with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        place = f"{server}/api/2.0/mlflow/experiments/get-by-name"
        answer = httpx.get(place, params={"experiment_name": EXPERIMENT}, timeout=PATIENCE).json()
        found = answer["experiment"]
        if any(tag["key"] == SHARED + KEY for tag in found["tags"]):
            shown = f"viewStateShareKey={KEY}&workflowType=machine_learning"
            return f"{server}/#/experiments/{found['experiment_id']}/runs?{shown}"
    return server


def run_name(profile: str, seed: int, changed: Mapping[str, str]) -> str:
    """Name a run after what is special about it: `beta=0.05, seed 0`, or `tiny, seed 0` where nothing is."""
    keys = [key for key in changed if key not in ("seed", "profile")]
    lasts = [key.rpartition(".")[2] for key in keys]
    parts: dict[str, None] = {}
    for key, last in zip(keys, lasts, strict=True):
        sections = key.split(".")
        if sections[0] == "recipes" and len(sections) > 2:
            parts[f"recipe {sections[2]}"] = None
        else:
            parts[f"{last if lasts.count(last) == 1 else key}={changed[key][:LONGEST]}"] = None
    more = [f"{len(parts) - NAMED} more"] if len(parts) > NAMED else []
    return ", ".join([*(list(parts)[:NAMED] or [profile]), *more, f"seed {seed}"])
