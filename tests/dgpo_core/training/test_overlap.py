"""Episodes that are sampled while the step before theirs trains: with which weights, and how they resume."""

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.agent.loop import AgentLoop, EpisodeRunner, Task
from dgpo_core.agent.transformers_engine import TransformersEngine
from dgpo_core.config.agent import ProbeConfig, ProtocolConfig, RolloutConfig, Sampling
from dgpo_core.config.training import ReinforceConfig
from dgpo_core.errors import InfrastructureError
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.episode_sources import Metrics, Rollout
from dgpo_core.training.overlap import StepEpisodes
from dgpo_core.training.reinforce import Reinforcer
from dgpo_core.training.weight_sync import EngineSync, SyncedLoop
from tests.dgpo_core.agent.scripted import Answering
from tests.dgpo_core.making import exact, question, random_episode, reinforcement, tiny_model, weights_of
from tests.dgpo_core.training.test_weight_sync import CopyEngine

CONFIG = ReinforceConfig(
    steps=5, batch_size=6, mini_batch_size=3, actor_learning_rate=3e-3, critic_learning_rate=1e-2,
    importance_cap=2.0, dev_every=3, checkpoint_every=2,
)  # fmt: skip
FAILED = replace(random_episode(0), outcome=Outcome.FAILED, failure="the index is gone")
Weights = dict[str, torch.Tensor]


@pytest.fixture
def student(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny_model(tokenizer, 1)


def rollout_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, separate: bool = False) -> Rollout:
    """Two turns of six tokens of the model as it is when asked; or of a `separate` engine, as vLLM is."""
    config = ProtocolConfig(instruction="short", max_turns=1, max_new_tokens=6)
    loop: EpisodeRunner
    if separate:
        probe = ProbeConfig(prompts=1, tokens=4, tolerance=1e-4)
        sync = EngineSync(CopyEngine(model, tokenizer), model, [[20, 21]], probe, exact())
        loop = SyncedLoop(sync, tokenizer, Answering(), config, 1)
    else:
        engine = TransformersEngine(model, tokenizer, RolloutConfig(precision="float32"))
        loop = AgentLoop(engine, tokenizer, Answering(), config, 1)

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        tasks = [Task(question(name=f"q{i}"), "onehop", seed=(step, place)) for place, i in enumerate(chosen)]
        return loop.run(tasks, Sampling())

    return rollout


Train = Callable[..., tuple[Weights, list[Metrics]]]


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Train:
    """Return a function that trains, overlapping where it gets a `sampler`."""

    def run(
        student: PreTrainedModel,
        rollout: Rollout,
        sampler: PreTrainedModel | None = None,
        *,
        folder: str = "state",
        kill_at: int | None = None,
        **settings: Any,
    ) -> tuple[Weights, list[Metrics]]:
        config = CONFIG.model_copy(update={"overlap": sampler is not None, **settings})
        teacher, known = tiny_model(tokenizer, 2), len(tokenizer)
        trainer = Reinforcer(student, teacher, reinforcement(), config, exact(100), 3, known, sampler)
        evaluated = sampler or student

        def report(_: int, rows: list[Metrics]) -> None:
            if len(rows) == kill_at:
                raise KeyboardInterrupt

        def evaluate() -> float:
            return sum(parameter.double().sum().item() for parameter in evaluated.parameters())

        rows = trainer.train(20, rollout, Checkpoint(tmp_path / folder), evaluate, report)
        return weights_of(student), rows

    return run


def overlapped(
    train: Train,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    separate: bool = False,
    **how: Any,
) -> Any:
    sampler = copy.deepcopy(student)
    return train(copy.deepcopy(student), rollout_of(sampler, tokenizer, separate), sampler, **how)


def sequential(train: Train, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    """One thing after the other, and episodes that the student of a step ago writes."""
    trained, older = copy.deepcopy(student), copy.deepcopy(student)
    history: list[Weights] = []

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        history.append(weights_of(trained))
        older.load_state_dict(history[max(0, step - 1)])
        return rollout_of(older, tokenizer)(chosen, step)

    return train(trained, rollout, folder="sequential")


def same(first: tuple[Weights, list[Metrics]], second: tuple[Weights, list[Metrics]]) -> bool:
    return first[1] == second[1] and all(torch.equal(second[0][k], value) for k, value in first[0].items())


@pytest.mark.parametrize(("threads", "separate"), [(1, False), (3, False), (1, True)])
def test_episodes_are_those_of_the_weights_of_a_step_ago(
    train: Train,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    threads: int,
    separate: bool,
) -> None:
    expected = sequential(train, student, tokenizer)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = overlapped(train, student, tokenizer, separate)
    finally:
        torch.set_num_threads(before)
    assert same(found, expected)
    gaps = [row["engine_gap_mean"] for row in found[1]]
    assert max(gaps[:1]) < 1e-5 < min(gaps[1:]), "the first step alone is on-policy"
    on_policy = train(copy.deepcopy(student), rollout_of(student, tokenizer), folder="other")
    assert not same(found, on_policy)


@pytest.mark.parametrize("kill_at", [1, 3, 4])
@pytest.mark.thorough
def test_resumed_run_is_bit_identical(
    train: Train, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, kill_at: int
) -> None:
    whole = overlapped(train, student, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        overlapped(train, student, tokenizer, folder="killed", kill_at=kill_at)
    assert same(overlapped(train, student, tokenizer, folder="killed"), whole)


@pytest.mark.thorough
def test_an_outage_ahead_stops_training_which_then_goes_on_exactly(
    train: Train, student: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = overlapped(train, student, tokenizer, checkpoint_every=1)
    sampler = copy.deepcopy(student)
    working = rollout_of(sampler, tokenizer)

    def broken(chosen: list[int], step: int) -> list[Episode]:
        return [FAILED] * len(chosen) if step == 3 else working(chosen, step)

    with pytest.raises(InfrastructureError, match="episodes of a step failed: the index is gone"):
        train(copy.deepcopy(student), broken, sampler, folder="broken", checkpoint_every=1)
    assert same(overlapped(train, student, tokenizer, folder="broken", checkpoint_every=1), whole)


def test_it_samples_while_the_step_trains(student: PreTrainedModel) -> None:
    trains, sampled = threading.Event(), threading.Event()

    def rollout(step: int) -> list[Episode]:
        if step == 1:
            assert trains.wait(10), "the step waited for the next one's episodes"
        sampled.set()
        return [random_episode(step)]

    steps = StepEpisodes(rollout, student, copy.deepcopy(student), 2)
    assert steps.take(0) == [random_episode(0)]
    sampled.clear()
    with steps.ahead(1):
        trains.set()
        assert sampled.wait(10)
    assert steps.take(1) == [random_episode(1)]
    with steps.ahead(2):
        pass
    assert steps.pending is None, "there is no third step"


def test_a_step_that_fails_leaves_no_thread(student: PreTrainedModel) -> None:
    steps = StepEpisodes(lambda step: [random_episode(step)], student, copy.deepcopy(student), 2)
    before = threading.active_count()
    with pytest.raises(KeyError), steps.ahead(1):
        raise KeyError
    assert threading.active_count() == before and steps.pending is None
