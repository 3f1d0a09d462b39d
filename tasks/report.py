"""Stage `report`: tables, curves, ARCap and an episode reader of the compared models."""

from dgpo_core.config.params import load_params
from dgpo_core.reporting.report import write_report
from tasks.paths import EVALUATION, METRICS, PLOTS, REPORTS
from tasks.stage import main, stage


def report() -> None:
    params = load_params()
    models = params.compare
    inputs = [EVALUATION / model for model in models]
    with stage("report", config={"models": models}, inputs=inputs, outputs=[REPORTS]) as run:
        mirrors = dict(params.questions.test)
        dumped = params.model_dump(mode="json")
        write_report(
            EVALUATION, PLOTS, METRICS, REPORTS, models, mirrors, dumped, params.pair, params.report.first
        )
        run.progress(1, 1)


if __name__ == "__main__":
    main(report)
