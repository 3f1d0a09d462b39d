"""Stage `base-models`: build the embedded student and teacher from a seed (the built files are in git)."""

from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import STUDENT, TEACHER
from dgpo_core.training.base_models import BaseModelBuilder
from tasks.paths import MODELS
from tasks.stage import main, stage


def build() -> None:
    params = load_params()
    config = {
        "base_models": params.base_models.model_dump(),
        "protocol": params.protocol.model_dump(),
    }
    with stage("base-models", config=config, inputs=[], outputs=[MODELS / STUDENT, MODELS / TEACHER]) as run:
        phases = [*params.base_models.student_phases, *params.base_models.teacher_phases]
        total, done = sum(phase.steps for phase in phases), dict[str, int]()

        def report(phase: str, step: int, metrics: dict[str, float]) -> None:
            done[phase] = step
            run.progress(sum(done.values()), total, phase=phase, loss=metrics["loss"])
            run.metrics(step, {f"{phase}/{key}": value for key, value in metrics.items()})

        builder = BaseModelBuilder(
            params.base_models, params.protocol, params.retrieval.top_k, run.state, report
        )
        builder.build(MODELS)


if __name__ == "__main__":
    main(build)
