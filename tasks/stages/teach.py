"""Stage `teach`: run the teacher, or a scripted expert, on the training questions, and keep all episodes."""

from pathlib import Path

from dgpo_core.agent.episode import Outcome, write_episodes
from dgpo_core.agent.loop import collect, em_of
from dgpo_core.config.params import load_params
from dgpo_core.models import load_tokenizer
from dgpo_core.vocabulary import check_same_vocabulary
from tasks.project.paths import INDEX, MODELS, QUESTIONS, TEACHER_EPISODES
from tasks.stages.inputs import local, retriever
from tasks.stages.outputs import write_metrics
from tasks.stages.rollouts import split_tasks, teaching_loop
from tasks.stages.stage import stage, stage_main


def teach() -> None:
    params = load_params()
    config = params.sections("teach", "protocol", "rollout", "retrieval", "models", "questions")
    source = params.episode_tokenizer
    inputs = [INDEX, QUESTIONS, *local(source)]
    with stage("teach", config=config, inputs=inputs, outputs=[TEACHER_EPISODES]) as run:
        tokenizer = load_tokenizer(source)
        imitates = params.need_one_vocabulary and params.models.endpoint is None
        if imitates and MODELS not in Path(params.models.student).parents:
            # before the long work; a model of ours, which may not have been built yet, has our tokenizer
            check_same_vocabulary(*map(load_tokenizer, (params.models.student, params.models.teacher)))
        index = retriever(params)
        tasks = split_tasks(params, "train", params.teach.seed, params.teach.questions)
        loop, tasks = teaching_loop(params, tokenizer, index, tasks, run.note)
        episodes = collect(
            loop,
            tasks,
            params.teach.sampling,
            params.teach.chunk,
            run.state / "episodes",
            lambda done, total, em: run.progress(done, total, em=em),
        )
        write_episodes(run.output(TEACHER_EPISODES), episodes, {"index": index.digest})
        summary = {
            "episodes": len(episodes),
            "failed": sum(e.outcome is Outcome.FAILED for e in episodes),
            "em": em_of(episodes),
            "searches": sum(len(e.searches) for e in episodes) / len(episodes),
            "model_tokens": sum(e.model_tokens for e in episodes) / len(episodes),
        }
        write_metrics(run, summary)


if __name__ == "__main__":
    stage_main("teach", teach)
