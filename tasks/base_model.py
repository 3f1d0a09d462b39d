"""Stage `base-model`: build one of the embedded models from a seed (student and teacher are in git)."""

from dgpo_core.config.params import PARAMS, load_params
from dgpo_core.errors import UserError
from dgpo_core.pretraining.build import BaseModelBuilder
from tasks.paths import MODELS
from tasks.stage import stage, stage_main


def build(name: str) -> None:
    params = load_params()
    base = params.base_models
    if name not in base.models:
        raise UserError(f"{PARAMS}: base_models.models has no {name!r}, only {sorted(base.models)}")
    config = {
        "base_models": base.model_dump(exclude={"models"}),
        "model": base.models[name].model_dump(),
        "protocol": params.protocol.model_dump(),
        "top_k": params.retrieval.top_k,
    }
    out = MODELS / name
    with stage(f"base-model@{name}", config=config, inputs=[], outputs=[out]) as run:
        total, done = sum(phase.steps for phase in base.models[name].phases), dict[str, int]()

        def report(phase: str, step: int, metrics: dict[str, float]) -> None:
            done[phase] = step
            run.progress(sum(done.values()), total, phase=phase, loss=metrics["loss"])
            run.metrics(step, {f"{phase}/{key}": value for key, value in metrics.items()})

        BaseModelBuilder(base, params.protocol, params.retrieval.top_k, run.state, report).build(name, out)


if __name__ == "__main__":
    stage_main("base-model", build, "model")
