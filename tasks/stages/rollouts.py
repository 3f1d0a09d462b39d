"""What a stage rolls out with: an agent loop around a model, tasks for it, its validation, its progress."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.endpoint_engine import EndpointEngine
from dgpo_core.agent.engine import Engine, GuidedEngine, SeparateEngine
from dgpo_core.agent.episode import Episode, read_metadata
from dgpo_core.agent.expert import ExpertEngine, has_gold_passages
from dgpo_core.agent.loop import AgentLoop, EpisodeRunner, Task, em_of, stable_seed
from dgpo_core.agent.prompts import encode_prompt, known_ids
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.agent.vllm_engine import VllmEngine
from dgpo_core.agent.vllm_server import VllmServerEngine
from dgpo_core.config.agent import GREEDY, Sampling
from dgpo_core.config.params import PARAMS, Params
from dgpo_core.config.recipes import STUDENT, TEACHER, Distillation, Reinforcement
from dgpo_core.config.training import OnPolicyConfig
from dgpo_core.datasets.records import Question, read_questions
from dgpo_core.endpoint import EndpointClient
from dgpo_core.errors import UserError
from dgpo_core.files import write_json
from dgpo_core.models import add_adapters, cut_depth, load_model
from dgpo_core.retrieval.ranking import Retriever
from dgpo_core.training import parallel
from dgpo_core.training.episode_sources import Rollout, require_answered
from dgpo_core.training.watch import BAD, Watch
from dgpo_core.training.weight_sync import EngineSync, SharedLoop, SyncedLoop
from tasks.project.paths import questions_file
from tasks.project.process import processor_seconds
from tasks.stages.outputs import write_csv
from tasks.stages.stage import COLLAPSE, RUNS, Run


def training_settings(params: Params, section: str, recipe: Distillation | Reinforcement) -> dict[str, Any]:
    """Return what decides the result of a training stage, besides its inputs; `section` is its own.

    `params` are those of the recipe (`Params.for_recipe`).
    """
    shared = ("compute", "protocol", "rollout", "retrieval", "models", "questions", "seed")
    return params.sections(section, *shared) | {"recipe": recipe.model_dump(exclude={"settings"})}


def agent_loop(params: Params, source: str, tokenizer: Any, index: Retriever) -> AgentLoop:
    """Return the loop of a given model (folder or hub name), which stays as it is."""
    engine: Engine | None = separate_engine(params, source, tokenizer)
    if engine is None:
        engine = TransformersEngine(load_model(source, params.compute.device), tokenizer, params.rollout)
    return AgentLoop(engine, tokenizer, index, params.protocol, params.retrieval.top_k)


def teaching_loop(
    params: Params, tokenizer: Any, index: Retriever, tasks: list[Task], note: Callable[[str], None]
) -> tuple[AgentLoop, list[Task]]:
    """Return the loop of whoever writes the teacher's episodes, and those of `tasks` that it can do.

    `note` is told how many it cannot. Raises UserError where the expert can do none.
    """
    if not params.taught_by_text:
        return agent_loop(params, params.models.teacher, tokenizer, index), tasks
    if params.teach.policy == "expert":
        possible = [task for task in tasks if has_gold_passages(task.question)]
        if left_out := len(tasks) - len(possible):
            note(f"{left_out} of {len(tasks)} questions have no gold passages: the expert leaves them out")
        if not possible:
            raise UserError(
                "teach.policy: expert reads the questions' gold passages, and no training question has any "
                "(metadata.golden_passages, title and text; docs/data.md)"
            )
        tasks = possible
    # the engines below find a task's question by its number
    tasks = [replace(task, seed=(number, *task.seed)) for number, task in enumerate(tasks)]
    questions = [task.question for task in tasks]
    engine: Engine = ExpertEngine(questions, tokenizer)
    if params.teach.policy == "teacher" and params.models.endpoint:
        client = EndpointClient(params.models.endpoint, params.teach.endpoint)
        instruction = params.protocol.instruction
        engine = EndpointEngine(client, params.teach.api, questions, instruction, tokenizer)
    return AgentLoop(engine, tokenizer, index, params.protocol, params.retrieval.top_k), tasks


def guided_engine(
    params: Params, student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: Any
) -> GuidedEngine:
    """Return the engine of a student in training some of whose turns its teacher writes. Raise UserError."""
    if params.rollout.engine != "transformers":
        raise UserError(
            "distill.on_policy.intervention: student and teacher write in one process: "
            "set rollout.engine: transformers"
        )
    return GuidedEngine(
        *(TransformersEngine(model, tokenizer, params.rollout) for model in (student, teacher))
    )


def training_loop(
    params: Params,
    model: PreTrainedModel,
    source: str,
    tokenizer: Any,
    index: Retriever,
    guided: GuidedEngine | None = None,
) -> EpisodeRunner:
    """Return the loop of a model in training, loaded from `source`: its weights are always the newest."""
    top_k = params.retrieval.top_k
    if params.rollout.engine == "transformers":
        shared = guided or TransformersEngine(model, tokenizer, params.rollout)
        return SharedLoop(AgentLoop(shared, tokenizer, index, params.protocol, top_k))
    engine = separate_engine(params, source, tokenizer) if parallel.leads() else None
    if engine is None:
        return SyncedLoop(None, tokenizer, index, params.protocol, top_k)
    probe = params.rollout.probe
    probed = split_tasks(params, "train", params.seed, probe.prompts)[: probe.prompts]
    instruction = params.protocol.instruction
    prompts = [encode_prompt(task.question.question, instruction, tokenizer) for task in probed]
    sync = EngineSync(engine, model, prompts, probe, params.compute, known_ids(tokenizer))
    return SyncedLoop(sync, tokenizer, index, params.protocol, top_k)


def separate_engine(params: Params, source: str, tokenizer: Any) -> SeparateEngine | None:
    """Return vLLM as `rollout` says, None for transformers. Raise UserError or InfrastructureError."""
    config, longest = params.rollout, params.protocol.max_context
    if config.engine == "vllm":
        return VllmEngine(source, tokenizer, config, longest)
    if config.engine == "vllm-server":
        part = TEACHER if source == params.models.teacher else STUDENT
        urls = config.server.teacher if part == TEACHER else config.server.student
        if not urls:
            raise UserError(f"{PARAMS}: rollout.server.{part}: no URL of a server for {source}")
        return VllmServerEngine(urls, source, tokenizer, config, longest)
    return None


def load_student(params: Params, start: str, layers: int | None = None) -> PreTrainedModel:
    """Load the model that a stage trains, or so many of its `layers`, as `compute` asks for."""
    compute = params.compute
    narrow = compute.lora is not None and compute.precision == "bfloat16"  # what is not trained loses nothing
    student = load_model(start, compute.device, torch.bfloat16 if narrow else torch.float32)
    if layers is not None:
        student = cut_depth(student, layers)
    if compute.lora is not None:
        add_adapters(student, compute.lora, params.seed)
    if compute.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    return student


def training_rollout(
    runner: EpisodeRunner,
    tasks: list[Task],
    sampling: Sampling,
    seed: int,
    max_failed_share: float = 1.0,
) -> Rollout:
    """Return the rollout of a step's questions; every place of every step has a sampling seed of its own.

    It raises InfrastructureError where more than that share of a step's episodes has failed.
    """

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        drawn = [
            Task(tasks[i].question, tasks[i].dataset, seed=(stable_seed(seed, step, place),))
            for place, i in enumerate(chosen)
        ]
        episodes = runner.run(drawn, sampling)
        require_answered(episodes, max_failed_share)
        return episodes

    return rollout


def guided_rollout(rollout: Rollout, engine: GuidedEngine, config: OnPolicyConfig) -> Rollout:
    """Return the rollout in which the teacher writes turns, with each step fewer (Guided-OPD)."""

    def guided(chosen: list[int], step: int) -> list[Episode]:
        with engine.intervening(config.intervention * (1 - step / config.steps)):
            return rollout(chosen, step)

    return guided


def tasks_for(dataset: str, questions: list[Question], seed: int) -> list[Task]:
    """Return one task a question, each with a sampling seed of its own."""
    return [Task(q, dataset, seed=(stable_seed(seed, dataset, q.id),)) for q in questions]


def split_tasks(params: Params, split: str, seed: int, limit: int | None = None) -> list[Task]:
    """Return tasks of the training sets' `split`, set after set; at most `limit` questions of each."""
    tasks: list[Task] = []
    for name in params.questions.train:
        questions = read_questions(questions_file(name, split))
        tasks += tasks_for(name, questions[:limit], seed)
    return tasks


class DevEvaluator:
    """Measures greedy EM on the validation questions, as many of each training set.

    Raises InfrastructureError when all episodes failed, or too many: no figure may come of it.
    """

    def __init__(self, params: Params, runner: EpisodeRunner, questions: int) -> None:
        self._runner, self._max_failed_share = runner, params.watch.max_failed_share
        each = max(1, questions // len(params.questions.train))
        self._tasks = split_tasks(params, "dev", params.seed, each)

    def __call__(self) -> float:
        episodes = self._runner.run(self._tasks, GREEDY)
        require_answered(episodes, self._max_failed_share)
        return em_of(episodes)


def watch(run: Run, params: Params) -> Watch:
    """Return what a training is watched by; dropped steps stay with the run's records when it has ended."""
    return Watch(params.watch, RUNS / run.stage / "dropped")


def validation(
    run: Run, rows: list[dict[str, float]], patience: int | None, steps: int, watch: Watch
) -> dict[str, float]:
    """Return the validation EM of the model that is kept, the last or the best, and the step it is of."""
    looks = [(row["dev_em"], int(row["step"])) for row in rows if "dev_em" in row]
    rolled_back = watch.rolls_back(rows)
    em, step = max(looks, key=lambda look: look[0]) if patience or rolled_back else looks[-1]
    if rolled_back:
        run.note(f"rolled back after step {len(rows)} of {steps} to the model of step {step}")
    elif len(rows) < steps:
        run.note(
            f"ended after step {len(rows)} of {steps}: no better validation EM {patience} times in a row"
        )
    return {"dev_em": em, "kept_step": step}


class ProcessorTime:
    """Measures the processor seconds that a training has taken up to each step, over kills and resumes.

    All processes that train together count. They are kept in the stage's state, beside the checkpoint: a step
    that is done again after a kill counts once, and starting again does not count.
    """

    def __init__(self, run: Run) -> None:
        self._kept, self._leads = run.state / "processor_time.json", run.leads
        self._seconds: list[float] = json.loads(self._kept.read_text()) if self._kept.is_file() else []
        self._last = processor_seconds()

    def stepped(self, step: int) -> None:
        """Take the time at the end of step number `step` (from 1)."""
        now = processor_seconds()
        own = parallel.all_sum({"seconds": now - self._last})["seconds"]
        before = self._seconds[: step - 1]
        self._seconds, self._last = [*before, own + (before[-1] if before else 0.0)], now
        if self._leads:
            write_json(self._kept, self._seconds)

    def write(self, path: Path, steps: int) -> None:
        """Write the cumulative seconds of the first `steps` steps."""
        rows = ([step, f"{own:.3f}"] for step, own in enumerate(self._seconds[:steps], 1))
        write_csv(path, [["step", "processor_seconds"], *rows])


def reporter(
    run: Run, shown: tuple[str, ...], time: ProcessorTime, watch: Watch
) -> Callable[[int, list[dict[str, float]]], None]:
    """Return a function that takes a trainer's rows to the progress bar (the `shown`) and to MLflow.

    It is called after each step, whose `time` it takes.

    Noted are dropped steps, what has collapsed, and the first step without a reward: it is easily taken for
    one that taught something. MLflow has the number of the former two at every step, as a number that is none
    would be a gap there.
    """
    noted = False

    def report(steps: int, rows: list[dict[str, float]]) -> None:
        step, row = len(rows), rows[-1]
        time.stepped(step)
        values: dict[str, Any] = {key: row[key] for key in shown if key in row}
        if looks := [row["dev_em"] for row in rows if "dev_em" in row]:
            values["dev_em"] = looks[-1]
        run.progress(step, steps, **values)
        nonlocal noted
        if row.get("unrewarded") and not noted:
            noted = True
            run.note(
                f"step {step}: no episode was rewarded. Such a step learns nothing but the KL to the "
                "reference, where there is one (metric unrewarded)"
            )
        if BAD in row and (kept := watch.kept(step)) and run.leads:
            run.note(f"step {step} was dropped: {read_metadata(kept)['reason']} (its episodes: {kept})")
        for figure, said in watch.new_alarms(rows).items():
            run.note(f"{COLLAPSE} of {figure} at step {step}: {said}")
        counts = {"bad_steps": sum(BAD in each for each in rows), "collapsed": len(watch.alarms(rows))}
        own = {key: value for key, value in row.items() if key not in ("step", BAD)}
        run.metrics(step, {**own, **counts})

    return report
