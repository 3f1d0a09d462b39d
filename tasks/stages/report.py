"""Stage `report`: write tables, curves, ARCap and an episode reader of the compared models."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dgpo_core.config.params import Params, load_params
from dgpo_core.reporting.page import Origin, write_report
from tasks.project.dvc import read_lock, upstream
from tasks.project.paths import EVALUATION, METRICS, PLOTS, REPORTS
from tasks.project.process import machine
from tasks.stages.stage import RUNS, stage, stage_main
from tasks.tracking.evaluations import record_evaluations
from tasks.tracking.lineage import changed_settings, labels
from tasks.tracking.registry import Registry
from tasks.tracking.runs import PIPELINE_RUN, flatten
from tasks.tracking.summary import results

if TYPE_CHECKING:
    from mlflow import MlflowClient

GIVEN = ("base-model@", "given@")  # stages of what the pipeline starts from
SHOWN = 4  # changed settings under the title; all of them stand at the end


def report() -> None:
    """Write the report, and keep the evaluations with the registered models."""
    params = load_params()
    models = params.compare
    inputs = [EVALUATION / model for model in models]
    with stage("report", config={"models": models}, inputs=inputs, outputs=[REPORTS]) as run:
        mirrors = dict(params.questions.test)
        dumped = params.model_dump(mode="json")
        out, first, origin = run.output(REPORTS), params.report.first, origin_of(params)
        write_report(EVALUATION, PLOTS, METRICS, out, models, mirrors, dumped, params.pair, first, origin)
        run.tracker.metrics(0, results(out))
        run.tracker.submit(lambda client, _: _record(client, params))
        run.progress(1, 1)


def origin_of(params: Params) -> Origin:
    """Say of the run what tells its report from another one's, as far as it is known here."""
    known, changed = labels(), flatten(changed_settings(params))
    facts = [params.profile, f"seed {params.seed}", f"{datetime.now(UTC):%-d %b %Y %H:%M} UTC"]
    if commit := known.get("git.commit"):
        facts.append(f"commit {commit[:8]}{', changed' if known.get('git.dirty') == 'true' else ''}")
    facts += _time(params.compare)
    others = [f"{key}={value}" for key, value in changed.items() if key != "seed"]
    more = [f"{len(others) - SHOWN} more"] if len(others) > SHOWN else []
    facts.append(f"changed: {', '.join([*others[:SHOWN], *more]) or 'nothing'}")
    if run := os.environ.get(PIPELINE_RUN):
        facts.append(f"MLflow run {run[:8]}")
    return Origin(facts, changed)


def _time(models: Sequence[str]) -> Iterator[str]:
    """Give the time that the stages of these models took, and on what machines.

    Stages whose outputs came from a cache left no record here.
    """
    made = upstream(read_lock(), [(EVALUATION / model).as_posix() for model in models])
    names = [name for name in made if not name.startswith(GIVEN)]
    records = [record for name in names if (record := _record_of(name))]
    if records:
        minutes = sum(record["seconds"] for record in records) / 60
        part = "" if len(records) == len(names) else f" of {len(names)}, the others from a cache"
        yield f"{minutes:.1f} min in {len(records)} stages{part}"
    machines = dict.fromkeys(record["machine"] for record in records if "machine" in record)
    yield "; ".join(machines) or machine()


def _record_of(name: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        record: dict[str, Any] = json.loads((RUNS / name / "run.json").read_text(encoding="utf-8"))
        return record if record["status"] == "FINISHED" else None
    return None


def _record(client: "MlflowClient", params: Params) -> None:
    record_evaluations(Registry(client), params, read_lock())


if __name__ == "__main__":
    stage_main("report", report)
