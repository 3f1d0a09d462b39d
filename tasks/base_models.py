"""Stage `base-models`: build the embedded student and teacher from a seed (the built files are in git)."""

import torch

from dgpo_core.config.params import load_params
from dgpo_core.training.base_models import BaseModelBuilder
from tasks.paths import BASE_MODELS
from tasks.stage import main, stage


def build() -> None:
    params = load_params()
    config = {
        "base_models": params.base_models.model_dump(),
        "protocol": params.protocol.model_dump(),
        "threads": torch.get_num_threads(),
    }
    with stage("base-models", config=config, inputs=[], outputs=[BASE_MODELS]) as run:

        def report(phase: str, step: int, steps: int, metrics: dict[str, float]) -> None:
            run.progress(step, steps, phase=phase, loss=metrics["loss"])
            run.metrics(step, {f"{phase}/{key}": value for key, value in metrics.items()})

        builder = BaseModelBuilder(
            params.base_models, params.protocol, params.retrieval.top_k, run.state, report
        )
        builder.build(BASE_MODELS)


if __name__ == "__main__":
    main(build)
