"""What the run of a pipeline says when it has ended: results, and which run made each stage's output.

Imports mlflow's entities; `tasks.tracking.runs.Pipeline` calls it with its client.
"""

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from dgpo_core.config.params import PARAMS
from tasks.project.dvc import LOCK
from tasks.project.paths import REPORTS
from tasks.project.progress import duration
from tasks.tracking.lineage import lock_digest, locked_outputs
from tasks.tracking.pages import NOTE

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Outputs = Mapping[str, Mapping[str, str]]  # stage -> path -> md5
OUTPUT = "dvc.outputs."  # tag of a stage's run: the output's path -> its digest in dvc.lock
MAX_NOTE = 8000  # characters, by MLflow's limit


@dataclass(frozen=True)
class StageSummary:
    """A stage, what this pipeline did with it, and the run that made its output (None: unknown)."""

    stage: str
    state: str
    run_id: str | None = None
    experiment: str | None = None
    seconds: float | None = None


def summarize(
    client: "MlflowClient", run_id: str, root: Path, planned: Iterable[str] | None, succeeded: bool
) -> None:
    """Describe the ended pipeline `run_id`: where its outputs are from, its results, dvc.lock, params.yaml.

    `planned` names the pipeline's stages; without it they are those of dvc.lock.
    """
    outputs = locked_outputs(root)
    experiment = client.get_run(run_id).info.experiment_id
    children = _children(client, experiment, run_id)
    for stage, child in children.items():
        if child.info.status == "FINISHED":
            _log(client, child.info.run_id, tags=_output_tags(outputs, stage))
    left = "unchanged" if succeeded else "not executed"
    stages = [
        _stage_summary(stage, children[stage].info.status, children[stage])
        if stage in children
        else _stage_summary(stage, left, _maker(client, experiment, outputs, stage))
        for stage in dict.fromkeys([*(outputs if planned is None else planned), *children])
    ]
    executed = sum(each.state == "executed" for each in stages)
    tags = {NOTE: note(stages), "stages": f"{executed} executed of {len(stages)}"}
    tags |= {"dvc.lock": digest} if (digest := lock_digest(root)) else {}
    reported = succeeded and "report" in {each.stage for each in stages}
    found = results(root / REPORTS) if reported else {}
    _log(client, run_id, tags, averages(found))
    client.log_dict(run_id, {"stages": [asdict(each) for each in stages]}, "stages.json")
    for path in (root / LOCK, root / PARAMS):
        if path.is_file():
            client.log_artifact(run_id, str(path))


def results(reports: Path) -> dict[str, float]:
    """Read a report's `em/<model>/<data set>` and `arcap/<model>/<measurement>`, if there is one."""
    found: dict[str, float | None] = {}
    with suppress(OSError, ValueError):
        for model, sets in json.loads((reports / "results.json").read_bytes()).items():
            found |= {f"em/{model}/{name}": scores["em"] for name, scores in sets.items()}
        for model, rows in json.loads((reports / "arcap.json").read_bytes()).items():
            found |= {f"arcap/{model}/{name}": row["mean"] for name, row in rows.items()}
    return {name: value for name, value in found.items() if value is not None}


def averages(found: dict[str, float]) -> dict[str, float]:
    """Return the average EM of each model, the method's and the last trained ones' first.

    MLflow compares runs by what was logged first, and draws a chart for every metric: the others are those of
    the stage's run.
    """
    from dgpo_core.reporting.budget import METHOD  # imports templates; every stage imports this

    own = [name for name in reversed(found) if name.endswith("/average")]
    return {name: found[name] for name in sorted(own, key=lambda name: name != f"em/{METHOD}/average")}


def note(stages: Iterable[StageSummary]) -> str:
    """Write the stages as a Markdown table with links to the runs, cut to what MLflow takes."""
    lines = ["| stage | state | time | run |", "| --- | --- | --- | --- |"]
    length, more = sum(map(len, lines)) + 100, 0
    for each in stages:
        link = (
            f"[{each.run_id[:8]}](#/experiments/{each.experiment}/runs/{each.run_id})" if each.run_id else ""
        )
        time = "" if each.seconds is None else duration(each.seconds)
        line = f"| {each.stage} | {each.state} | {time} | {link or 'unknown'} |"
        length += len(line) + 1
        if length > MAX_NOTE:
            more += 1
        else:
            lines.append(line)
    return "\n".join([*lines, *([f"\n{more} more: artifact `stages.json`"] if more else [])])


def _children(client: "MlflowClient", experiment: str, parent: str) -> dict[str, "Run"]:
    """Find the newest run of each stage that this pipeline executed."""
    mine = f"tags.`mlflow.parentRunId` = '{parent}'"
    runs = client.search_runs([experiment], mine, order_by=["attributes.start_time ASC"])
    return {run.data.tags["stage"]: run for run in runs if "stage" in run.data.tags}


def _maker(client: "MlflowClient", experiment: str, outputs: Outputs, stage: str) -> "Run | None":
    """Find the newest finished run of `stage` whose outputs had the digests that dvc.lock has now."""
    tags = _output_tags(outputs, stage)
    if not tags:
        return None
    conditions = [f"tags.stage = '{stage}'", "attributes.status = 'FINISHED'"]
    conditions += [f"tags.`{name}` = '{md5}'" for name, md5 in tags.items()]
    newest = ["attributes.start_time DESC"]
    found = client.search_runs([experiment], " and ".join(conditions), max_results=1, order_by=newest)
    return found[0] if found else None


def _stage_summary(stage: str, state: str, run: "Run | None") -> StageSummary:
    if run is None:
        return StageSummary(stage, state)
    start, end = run.info.start_time, run.info.end_time
    seconds = (end - start) / 1000 if end else None
    state = {"FINISHED": "executed"}.get(state, state.lower())
    return StageSummary(stage, state, run.info.run_id, run.info.experiment_id, seconds)


def _output_tags(outputs: Outputs, stage: str) -> dict[str, str]:
    return {f"{OUTPUT}{path}": md5 for path, md5 in outputs.get(stage, {}).items()}


def _log(
    client: "MlflowClient",
    run_id: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> None:
    from mlflow.entities import Metric, RunTag

    now = round(time.time() * 1000)
    points = [Metric(name, value, now, 0) for name, value in metrics.items()]
    client.log_batch(run_id, points, tags=[RunTag(name, value) for name, value in tags.items()])
