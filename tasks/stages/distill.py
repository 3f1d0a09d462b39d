"""Stage `distill`: train a recipe's student by distillation (eq. 1; docs/method.md, "Recipes")."""

from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.engine import GuidedEngine
from dgpo_core.agent.episode import Episode, read_episodes
from dgpo_core.agent.loop import EpisodeRunner
from dgpo_core.agent.prompts import encode_text, known_ids
from dgpo_core.config.params import Params, load_params
from dgpo_core.config.recipes import Distillation
from dgpo_core.datasets.records import read_corpus
from dgpo_core.errors import UserError
from dgpo_core.models import load_model, load_tokenizer, save_model
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import (
    CorpusTexts,
    EpisodeSource,
    MixedEpisodes,
    StudentEpisodes,
    TeacherEpisodes,
    without_failed,
)
from dgpo_core.training.keep import keeps
from dgpo_core.training.teacher_cache import TeacherCache
from dgpo_core.vocabulary import check_same_vocabulary
from tasks.project.paths import (
    CORPUS,
    CORRECT_EPISODES,
    DISTRIBUTIONS,
    INDEX,
    MODELS,
    PLOTS,
    PROCESSOR_TIME,
    QUESTIONS,
    TEACHER_EPISODES,
)
from tasks.stages.inputs import local, model_source, require_episodes, retriever
from tasks.stages.launch import in_processes
from tasks.stages.outputs import write_curves, write_metrics
from tasks.stages.rollouts import (
    DevEvaluator,
    ProcessorTime,
    guided_engine,
    guided_rollout,
    load_student,
    reporter,
    split_tasks,
    training_loop,
    training_rollout,
    training_settings,
    validation,
    watch,
)
from tasks.stages.stage import stage, stage_main


def distill(name: str) -> None:
    params = load_params()
    recipe = params.distillation(name)
    params = params.for_recipe(name)
    start, out = model_source(params, recipe.start), MODELS / name
    curves, times = (folder / f"distill-{name}.csv" for folder in (PLOTS, PROCESSOR_TIME))
    config = training_settings(params, "distill", recipe)
    inputs = [TEACHER_EPISODES, CORRECT_EPISODES, DISTRIBUTIONS, INDEX, QUESTIONS]
    inputs += [*local(start), *local(params.models.teacher)]
    if recipe.episodes == "corpus":
        inputs.append(CORPUS)
    with stage(f"distill@{name}", config=config, inputs=inputs, outputs=[out, curves, times]) as run:
        torch.manual_seed(params.seed)
        tokenizer = load_tokenizer(start)
        student = load_student(params, start, recipe.layers)
        teacher, cache = _teacher(params, recipe, tokenizer)
        guided = None
        if recipe.episodes == "student" and params.distill.on_policy.intervention:
            assert teacher is not None
            guided = guided_engine(params, student, teacher, tokenizer)
        loop = training_loop(params, student, start, tokenizer, retriever(params), guided)
        source = episode_source(params, recipe, loop, tokenizer, guided)
        dev = DevEvaluator(params, loop, params.distill.dev_questions)
        distiller = Distiller(
            student,
            teacher,
            recipe,
            params.distill,
            params.compute,
            source,
            cache,
            known_ids(tokenizer),
            watch(run, params),
        )
        report = reporter(run, ("loss", "em"), time := ProcessorTime(run), distiller.watch)
        checkpoint = Checkpoint(run.state, params.compute.keep_last, run.note)
        rows = distiller.train(checkpoint, dev, report)
        summary = validation(run, rows, params.distill.patience, source.steps, distiller.watch)
        begins_rl = any(row.start == name for row in params.recipes.reinforce.values())
        if begins_rl and (em := summary["dev_em"]) < params.distill.min_em:
            raise UserError(
                f"distill@{name}: validation EM {em:.3f} is below distill.min_em {params.distill.min_em}: "
                "the student is too weak for RL; train longer or lower the threshold"
            )
        if not run.leads:
            return
        save_model(student, tokenizer, run.output(out))
        write_curves(run.output(curves), rows)
        time.write(run.output(times), len(rows))
        shown = ("loss", "divergence", "em", "searches")
        write_metrics(run, summary | {key: rows[-1][key] for key in shown if key in rows[-1]})
        run.register_model(name, out)


def _teacher(
    params: Params, recipe: Distillation, tokenizer: Any
) -> tuple[PreTrainedModel | None, TeacherCache | None]:
    """Return what gives the recipe the teacher's distributions: the model, stored ones, or both."""
    if params.need_one_vocabulary:  # `ce` too imitates the token ids of a teacher that is loaded
        check_same_vocabulary(tokenizer, load_tokenizer(params.models.teacher))
    if not recipe.needs_distributions:
        return None, None
    cached = params.distill.teacher == "cache" and recipe.episodes in ("teacher", "mixed")
    cache = TeacherCache(DISTRIBUTIONS, tokenizer) if cached else None
    if recipe.episodes == "teacher" and cache:
        return None, cache
    return load_model(params.models.teacher, params.compute.device), cache


def episode_source(
    params: Params,
    recipe: Distillation,
    runner: EpisodeRunner,
    tokenizer: Any,
    guided: GuidedEngine | None = None,
) -> EpisodeSource:
    """Return the source of the teacher's episodes, the student's own, both, or the corpus's text."""
    if recipe.episodes == "corpus":
        texts = (f"{passage.title}\n{passage.text}" for passage in read_corpus(CORPUS))
        ids = [[*encode_text(text, tokenizer), tokenizer.eos_token_id] for text in texts]
        return CorpusTexts(ids, params.distill, params.seed)
    tasks = split_tasks(params, "train", params.seed)
    sampling, max_failed = params.distill.sampling, params.watch.max_failed_share
    rollout = training_rollout(runner, tasks, sampling, params.seed, max_failed)
    if guided is not None:
        rollout = guided_rollout(rollout, guided, params.distill.on_policy)
    if recipe.episodes == "student":
        return StudentEpisodes(rollout, len(tasks), params.distill, params.seed)
    episodes = teacher_episodes(recipe)
    if recipe.episodes == "mixed":
        return MixedEpisodes(episodes, rollout, len(tasks), params.distill, params.seed)
    return TeacherEpisodes(episodes, params.distill, params.seed)


def teacher_episodes(recipe: Distillation) -> list[Episode]:
    """Read the teacher's episodes that the recipe learns from. Raise UserError when there is none."""
    path = TEACHER_EPISODES if recipe.keep == "all" else CORRECT_EPISODES
    episodes = [episode for episode in without_failed(read_episodes(path)) if keeps(recipe.keep, episode)]
    require_episodes(len(episodes), f"episodes in {path} that keep: {recipe.keep} leaves")
    return episodes


if __name__ == "__main__":
    stage_main("distill", lambda name: in_processes(lambda: distill(name)), "recipe")
