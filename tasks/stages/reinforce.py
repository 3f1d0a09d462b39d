"""Stage `reinforce`: train a recipe's student by PPO, GRPO or REINFORCE, as its gate says (eqs. 2-4)."""

import copy

from transformers import PreTrainedModel

from dgpo_core.agent.episode import Decode, read_episodes
from dgpo_core.agent.loop import EpisodeRunner, Task
from dgpo_core.agent.prompts import known_ids
from dgpo_core.config.params import Params, load_params
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.models import load_model, load_tokenizer, save_model
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import Rollout
from dgpo_core.training.reinforce import Answered, Reinforcer
from dgpo_core.vocabulary import check_same_vocabulary
from tasks.project.paths import CORRECT_EPISODES, INDEX, MODELS, PLOTS, PROCESSOR_TIME, QUESTIONS
from tasks.stages.inputs import local, model_source, retriever
from tasks.stages.launch import in_processes
from tasks.stages.outputs import write_curves, write_metrics
from tasks.stages.rollouts import (
    DevEvaluator,
    ProcessorTime,
    load_student,
    reporter,
    split_tasks,
    training_loop,
    training_rollout,
    training_settings,
    validation,
    watch,
)
from tasks.stages.stage import Run, stage, stage_main
from tasks.tracking.traces import traced


def reinforce(name: str) -> None:
    params = load_params()
    recipe = params.reinforcement(name)
    params = params.for_recipe(name)
    start, out = model_source(params, recipe.start), MODELS / name
    curves, times = (folder / f"reinforce-{name}.csv" for folder in (PLOTS, PROCESSOR_TIME))
    config = training_settings(params, "reinforce", recipe)
    inputs = [INDEX, QUESTIONS, *local(start), *local(params.models.teacher)]
    if recipe.guidance == "teachable":
        inputs.append(CORRECT_EPISODES)
    with stage(f"reinforce@{name}", config=config, inputs=inputs, outputs=[out, curves, times]) as run:
        if recipe.placement == "reward" and recipe.divergence != "k1":
            run.note(
                f"recipes.reinforce.{name}.divergence: {recipe.divergence} as a reward does not pull towards "
                "the reference as eq. 4 does; only k1 has the KL's gradient (docs/method.md, Estimators)"
            )
        tokenizer = load_tokenizer(start)
        student = load_student(params, start)
        sampler = copy.deepcopy(student) if params.reinforce.overlap else student
        reference = _reference(params, recipe, start, tokenizer)
        loop = training_loop(params, sampler, start, tokenizer, retriever(params))
        tasks = split_tasks(params, "train", params.seed)
        rollout = _rollout(run, params, loop, tasks, tokenizer.decode)
        dev = DevEvaluator(params, loop, params.reinforce.dev_questions)
        trainer = Reinforcer(
            student,
            reference,
            recipe,
            params.reinforce,
            params.compute,
            params.seed,
            known_ids(tokenizer),
            sampler,
            _answered(recipe),
            tokenizer.decode,
            watch(run, params),
        )
        time = ProcessorTime(run)
        checkpoint = Checkpoint(run.state, params.compute.keep_last, run.note)
        report = reporter(run, ("em", "kl_inside", "searches"), time, trainer.watch)
        rows = trainer.train(len(tasks), rollout, checkpoint, dev, report)
        if not run.leads:
            return
        save_model(student, tokenizer, run.output(out))
        write_curves(run.output(curves), rows)
        time.write(run.output(times), len(rows))
        shown = ("em", "searches", "kl_inside", "kl_outside", "entropy")
        summary = validation(run, rows, params.reinforce.patience, params.reinforce.steps, trainer.watch)
        summary |= {key: rows[-1][key] for key in shown if key in rows[-1]}
        summary["gate_excluded"] = sum(row["gate_excluded"] for row in rows) / len(rows)
        write_metrics(run, summary)
        run.register_model(name, out)


def _rollout(run: Run, params: Params, loop: EpisodeRunner, tasks: list[Task], decode: Decode) -> Rollout:
    """Return the rollout of a step's questions, of which MLflow gets some episodes."""
    sampling, max_failed = params.reinforce.sampling, params.watch.max_failed_share
    rollout = training_rollout(loop, tasks, sampling, params.seed, max_failed)
    every, limit = params.reinforce.dev_every, params.evaluate.trace_episodes
    return traced(run, rollout, decode, every, limit) if run.leads else rollout


def _reference(
    params: Params, recipe: Reinforcement, start: str, tokenizer: object
) -> PreTrainedModel | None:
    """Return the frozen model of the KL: the teacher, the model that RL starts from, or none."""
    if recipe.reference == "none":
        return None
    if recipe.reference == "initial":
        return load_model(start, params.compute.device)
    check_same_vocabulary(tokenizer, load_tokenizer(params.models.teacher))
    return load_model(params.models.teacher, params.compute.device)


def _answered(recipe: Reinforcement) -> Answered:
    """Return the training questions that the teacher has answered correctly, where the gate asks for them."""
    if recipe.guidance != "teachable":
        return frozenset()
    return frozenset((e.dataset, e.question_id) for e in read_episodes(CORRECT_EPISODES))


if __name__ == "__main__":
    stage_main("reinforce", lambda name: in_processes(lambda: reinforce(name)), "recipe")
