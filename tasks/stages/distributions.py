"""Stage `distributions`: keep the teacher's distributions on its episodes, for all epochs and recipes.

Nothing is kept where the teacher runs in training, or cannot give the student any: it is an endpoint, or has
other tokens while no recipe asks for its distributions.
"""

import json

from dgpo_core.agent.episode import read_episodes
from dgpo_core.config.params import Params, load_params
from dgpo_core.errors import UserError
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.episode_sources import without_failed
from dgpo_core.training.teacher_cache import CERTIFICATE, build_cache
from dgpo_core.vocabulary import check_same_vocabulary
from tasks.project.paths import DISTRIBUTIONS, TEACHER_EPISODES
from tasks.stages.inputs import local, require_episodes
from tasks.stages.outputs import write_metrics
from tasks.stages.stage import stage, stage_main


def distributions() -> None:
    params = load_params()
    config = params.sections("distributions", "compute", "models") | {
        "teacher": params.distill.teacher,
        "taid_start": params.distill.taid.start,
    }
    inputs = [TEACHER_EPISODES, *local(params.models.teacher), *local(params.models.student)]
    with stage("distributions", config=config, inputs=inputs, outputs=[DISTRIBUTIONS]) as run:
        source = _without_distributions(params)
        if source:
            (folder := run.output(DISTRIBUTIONS)).mkdir()
            (folder / CERTIFICATE).write_text(json.dumps({"teacher": source}) + "\n")
            write_metrics(run, {"episodes": 0})
            return
        tokenizer = load_tokenizer(params.models.teacher)
        episodes = without_failed(read_episodes(TEACHER_EPISODES))
        require_episodes(len(episodes), f"episodes in {TEACHER_EPISODES}")
        kept = run.state / "distributions"  # a killed run keeps its finished files
        certificate = build_cache(
            kept,
            episodes,
            load_model(params.models.teacher, params.compute.device),
            load_model(params.models.student, params.compute.device),
            tokenizer,
            params.distributions,
            params.compute,
            run.progress,
            params.distill.taid,
        )
        kept.rename(run.output(DISTRIBUTIONS))
        summary = {key: value for key, value in vars(certificate).items() if key != "tokenizer"}
        write_metrics(run, summary)


def _without_distributions(params: Params) -> str | None:
    """Return what kind of teacher has no distributions kept, else None. Raises UserError for other tokens."""
    if params.distill.teacher == "live":
        return "live"
    if params.models.endpoint is not None:
        return "endpoint"
    try:
        check_same_vocabulary(*map(load_tokenizer, (params.models.student, params.models.teacher)))
    except UserError:
        if params.need_one_vocabulary:
            raise
        return "other vocabulary"
    return None


if __name__ == "__main__":
    stage_main("distributions", distributions)
