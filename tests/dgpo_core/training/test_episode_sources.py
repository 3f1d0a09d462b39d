"""Where a distillation's episodes come from: order, failed episodes, replay, and going on after a kill."""

import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.config.training import DistillConfig, DistillmConfig, OnPolicyConfig
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.training.batches import model_sequence
from dgpo_core.training.episode_sources import (
    CorpusTexts,
    MixedEpisodes,
    OffPolicySchedule,
    StudentEpisodes,
    TeacherEpisodes,
    batch_order,
    question_order,
)
from tests.dgpo_core.making import random_episode

TEACHER = [random_episode(seed) for seed in range(40)]
CONFIG = DistillConfig(
    epochs=3,
    batch_size=4,
    on_policy=OnPolicyConfig(steps=6, batch_size=5, dev_every=2),
    distillm=DistillmConfig(growth=0.5, tolerance=0.0, replay=8, validation=64),
)


def rollout(chosen: list[int], step: int) -> list[Episode]:
    """The student's episodes, the first one failed."""
    made = [random_episode(1000 * step + i) for i in chosen]
    return [replace(made[0], outcome=Outcome.FAILED), *made[1:]]


def test_batch_order() -> None:
    batches = batch_order(8, 3, 2, seed=0)
    assert [len(batch) for batch in batches] == [3, 3, 2, 3, 3, 2]
    first, second = (sorted(i for b in half for i in b) for half in (batches[:3], batches[3:]))
    assert first == second == list(range(8))
    assert batches[:3] != batches[3:]
    assert batch_order(8, 3, 2, seed=0) == batches != batch_order(8, 3, 2, seed=1)


def test_questions_come_in_shuffled_epochs() -> None:
    drawn = [i for step in range(10) for i in question_order(7, 5, step, seed=1)]
    epochs = [drawn[start : start + 7] for start in range(0, 49, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 7
    assert question_order(7, 5, 3, seed=1) == drawn[15:20]
    assert question_order(7, 5, 3, seed=2) != drawn[15:20]
    assert Counter(question_order(3, 9, 0, seed=1)) == {0: 3, 1: 3, 2: 3}


def test_the_corpus_is_laid_end_to_end_and_cut() -> None:
    texts = [[100 * n + place for place in range(7 + n % 5)] for n in range(30)]
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4}
    settings["corpus"] = {"tokens": 8, "validation": 3, "dev_every": 5}
    config = DistillConfig.model_validate(settings)
    source = CorpusTexts(texts, config, seed=0)
    epochs = [[e for step in steps for e in source.batch(step)] for steps in (range(8), range(8, 16))]
    assert source.steps == 16 and source.validate_every == 5 and len(source.held_out) == 3
    read = [*source.held_out, *epochs[0]]
    assert sorted(e.question_id for e in epochs[0]) == sorted(e.question_id for e in epochs[1])
    order = sorted(read, key=lambda episode: int(episode.question_id))
    ids = [token for episode in order for token in episode.token_ids]
    assert len(ids) == sum(map(len, texts)) // 8 * 8
    starts = [place for place, token in enumerate(ids) if token % 100 == 0]
    for start, end in pairwise(starts):
        assert ids[start:end] == texts[ids[start] // 100], "every text is whole, and in one piece"
    assert all(model_sequence(episode).positions == list(range(1, 8)) for episode in read)
    assert CorpusTexts(texts, config, seed=1).batch(0) != source.batch(0)
    settings["corpus"] = {"tokens": 8, "validation": 3, "sequences": 10}
    part = CorpusTexts(texts, DistillConfig.model_validate(settings), seed=0)
    assert part.steps == 6 and part.held_out == source.held_out
    drawn = [{e.question_id for step in steps for e in part.batch(step)} for steps in (range(3), range(3, 6))]
    assert drawn[0] == drawn[1] < {e.question_id for e in epochs[0]} and len(drawn[0]) == 10
    with pytest.raises(UserError, match=r"distill\.corpus\.tokens: the corpus has 7 tokens"):
        CorpusTexts(texts[:1], config, seed=0)


def test_teacher_episodes_are_cut_into_epochs() -> None:
    source = TeacherEpisodes(TEACHER, CONFIG, seed=0)
    assert (source.steps, source.validate_every, source.held_out) == (30, 10, ())
    epoch = [episode.question_id for step in range(10) for episode in source.batch(step)]
    assert sorted(epoch) == sorted(episode.question_id for episode in TEACHER)


def test_students_episodes_are_fresh_and_failed_ones_are_left_out() -> None:
    source = StudentEpisodes(rollout, 20, CONFIG, seed=0)
    assert (source.steps, source.validate_every) == (6, 2)
    first, second = (source.batch(step) for step in (0, 1))
    assert len(first) == len(second) == 4
    assert not {e.question_id for e in first} & {e.question_id for e in second}
    assert all(episode.outcome is not Outcome.FAILED for episode in [*first, *second])


def test_mixture_starts_with_the_teacher_and_moves_to_the_student() -> None:
    source = MixedEpisodes(TEACHER, rollout, 20, CONFIG, seed=0)
    assert len(source.held_out) == 4  # a tenth, where that is less than distillm.validation
    assert source.steps == 27
    early = [e for step in range(9) for e in source.batch(step)]
    assert {e.question_id for e in [*early, *source.held_out]} == {e.question_id for e in TEACHER}
    assert not any(e in source.held_out for e in early)
    for loss in (1.0, 1.1, 1.2):  # the first is the untrained student's, then it rises twice
        source.validated(loss)
    assert source.off_policy.phi == 1
    late = [source.batch(step) for step in range(9, 27)]
    assert not any(e in TEACHER for batch in late for e in batch)
    assert {len(batch) for batch in late} <= {3, 4}
    seen = Counter(e.question_id for batch in late for e in batch)
    assert max(seen.values()) > 1, "nothing was replayed"


def test_held_out_episodes_are_of_all_data_sets() -> None:
    episodes = [replace(e, dataset="onehop" if i < 20 else "twohop") for i, e in enumerate(TEACHER)]
    for seed in range(3):
        held_out = MixedEpisodes(episodes * 3, rollout, 20, CONFIG, seed).held_out
        assert {e.dataset for e in held_out} == {"onehop", "twohop"}
    assert len(MixedEpisodes(TEACHER[:5], rollout, 20, CONFIG, 0).held_out) == 1
    assert MixedEpisodes(TEACHER[:1], rollout, 20, CONFIG, 0).steps == 3


def test_a_step_whose_episodes_all_failed_is_an_outage() -> None:
    def down(chosen: list[int], step: int) -> list[Episode]:
        return [
            replace(random_episode(i), outcome=Outcome.FAILED, failure="no answer from the index")
            for i in chosen
        ]

    student = StudentEpisodes(down, 20, CONFIG, seed=0)
    mixed = MixedEpisodes(TEACHER, down, 20, CONFIG, seed=0)
    for loss in (1.0, 1.1, 1.2):
        mixed.validated(loss)
    for source in (student, mixed):
        with pytest.raises(InfrastructureError, match=r"all . episodes of a step failed: no answer"):
            source.batch(0)


@pytest.mark.parametrize("killed_at", [3, 15, 22])
def test_mixture_continues_exactly(killed_at: int) -> None:
    def run(source: MixedEpisodes, first: int, last: int) -> list[list[Episode]]:
        batches = []
        for step in range(first, last):
            batches.append(source.batch(step))
            if step % 5 == 0:
                source.validated(1.0 + step / 10)
        return batches

    whole = run(MixedEpisodes(TEACHER, rollout, 20, CONFIG, seed=2), 0, 27)
    killed = MixedEpisodes(TEACHER, rollout, 20, CONFIG, seed=2)
    run(killed, 0, killed_at)
    random.seed(1)
    again = MixedEpisodes(TEACHER, rollout, 20, CONFIG, seed=2)
    again.load_state_dict(killed.state_dict())
    assert run(again, killed_at, 27) == whole[killed_at:]


def test_phi_grows_where_validation_gets_worse() -> None:
    """Against the loss at the last growth: a slow rise counts too, and a fall moves nothing."""
    schedule, found = OffPolicySchedule(100, DistillmConfig()), []
    for loss in [2.0, 1.0, 2.05, 2.11, 2.15, 2.30, 1.0, 2.45]:
        schedule.update(loss)
        found.append(round(schedule.phi, 10))
    assert found == [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3]
    for loss in range(3, 30):
        schedule.update(loss)
    assert schedule.phi == 1.0


@pytest.mark.parametrize(
    ("draw", "step", "full", "expected"),
    [
        (0.39, 25, True, "replay"),
        (0.29, 25, True, "student"),
        (0.31, 25, True, "replay"),
        (0.39, 25, False, "student"),
        (0.40, 25, True, "teacher"),
        (0.40, 25, False, "teacher"),
        (0.00, 100, True, "replay"),
        (0.00, 100, False, "student"),
    ],
)
def test_origin_by_hand(draw: float, step: int, full: bool, expected: str) -> None:
    schedule = OffPolicySchedule(100, DistillmConfig())
    schedule.phi = 0.4
    assert schedule.origin(draw, step, full) == expected
