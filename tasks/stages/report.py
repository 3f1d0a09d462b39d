"""Stage `report`: write tables, curves, ARCap and an episode reader of the compared models."""

from typing import TYPE_CHECKING

from dgpo_core.config.params import Params, load_params
from dgpo_core.reporting.page import write_report
from tasks.project.dvc import read_lock
from tasks.project.paths import EVALUATION, METRICS, PLOTS, REPORTS
from tasks.stages.stage import stage, stage_main
from tasks.tracking.evaluations import record_evaluations
from tasks.tracking.registry import Registry

if TYPE_CHECKING:
    from mlflow import MlflowClient


def report() -> None:
    """Write the report, and keep the evaluations with the registered models."""
    params = load_params()
    models = params.compare
    inputs = [EVALUATION / model for model in models]
    with stage("report", config={"models": models}, inputs=inputs, outputs=[REPORTS]) as run:
        mirrors = dict(params.questions.test)
        dumped = params.model_dump(mode="json")
        out = run.output(REPORTS)
        write_report(
            EVALUATION, PLOTS, METRICS, out, models, mirrors, dumped, params.pair, params.report.first
        )
        run.tracker.submit(lambda client, _: _record(client, params))
        run.progress(1, 1)


def _record(client: "MlflowClient", params: Params) -> None:
    record_evaluations(Registry(client), params, read_lock())


if __name__ == "__main__":
    stage_main("report", report)
