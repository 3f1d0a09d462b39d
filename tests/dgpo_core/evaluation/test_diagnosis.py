"""Every wrong episode has exactly one first failure, and hand-made ones have the one they were made for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Ending, Outcome, Search
from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import (
    SCHEMA,
    Failure,
    HackingFlags,
    answer_attempts,
    as_table,
    diagnose,
    first_failure,
)
from tests.dgpo_core.evaluation.episodes import ONE_HOP, TWO_HOP, UNKNOWN, episode, search
from tests.dgpo_core.making import random_episode

WRONG = "<think> so </think><answer> Tarn </answer>"
NOTHING = "<think> I wonder </think>"
FILM, ADA = search("director of Silent Harbour", "1", "8"), search("Ada Quill born", "2", hit=True)
MISS = search("birthplace of Ada Quill", "8")
OTHER = search("birthplace of Ada Tarn", "8")  # half a name is another's
AGAIN = search("Silent Harbour Ada Quill", "1")  # names the second passage too, but in vain
NOT_FOUND = search("Silent Harbour director", "8", "9")
END = {"ending": Ending.BUDGET}

Case = tuple[Question, list[Search], tuple[str, ...], dict[str, Ending]]
CASES: dict[Failure, list[Case]] = {
    Failure.NO_ACTION: [
        (ONE_HOP, [], (NOTHING, NOTHING), END),
        (ONE_HOP, [], ("<answer> </answer>",), END),
        (ONE_HOP, [], (), {"ending": Ending.LENGTH}),  # the prompt left no room
        (TWO_HOP, [FILM], (NOTHING, NOTHING), END),
        (TWO_HOP, [FILM, ADA], (NOTHING,), END),
    ],
    Failure.STOPPED_EARLY: [
        (ONE_HOP, [], (WRONG,), {}),
        (UNKNOWN, [], (WRONG,), {}),
        (TWO_HOP, [FILM], (WRONG,), {}),
        (TWO_HOP, [NOT_FOUND, FILM], (WRONG,), {}),  # the miss was made good
    ],
    Failure.BAD_QUERY: [
        (ONE_HOP, [search("capital of Velmora", "8")], (WRONG,), {}),
        (UNKNOWN, [search("capital of Tarn", "8")], (WRONG,), {}),
        (TWO_HOP, [FILM, OTHER], (WRONG,), {}),
        (TWO_HOP, [FILM, FILM], (WRONG,), {}),
        (TWO_HOP, [AGAIN, AGAIN], (WRONG,), {}),
        (TWO_HOP, [FILM, OTHER], (NOTHING,), END),  # before the missing action
        (ONE_HOP, [search("who is it?", "8")], (WRONG,), {}),  # function words alone
    ],
    Failure.EVIDENCE_NOT_FOUND: [
        (ONE_HOP, [NOT_FOUND], (WRONG,), {}),
        (ONE_HOP, [search("Silent Harbour's director")], (WRONG,), {}),  # no passage at all
        (UNKNOWN, [search("director of Silent Harbour", "8"), search("Ada Quill", "9")], (WRONG,), {}),
        (TWO_HOP, [FILM, MISS], (WRONG,), {}),
        (TWO_HOP, [FILM, MISS, MISS], (WRONG,), {}),  # the first of them was sensible
        (TWO_HOP, [FILM], ("<search> Ada Quill </search>",), END),  # no turn left to answer it
    ],
    Failure.EVIDENCE_NOT_USED: [
        (ONE_HOP, [FILM], (WRONG,), {}),
        (UNKNOWN, [ADA], (WRONG,), {}),
        (TWO_HOP, [FILM, ADA], (WRONG,), {}),
        (TWO_HOP, [FILM, ADA], ("<search> more </search>",), END),
    ],
    Failure.ANSWER_FORMAT: [
        (TWO_HOP, [FILM, ADA], ("<answer> It is Velmora, I think. </answer>",), {}),
        (TWO_HOP, [], ("<answer> It is Velmora, I think. </answer>",), {}),  # whatever happened before
        (TWO_HOP, [FILM, ADA], ("<answer> Velmora <answer> Tarn </answer>",), {}),  # nested
        (TWO_HOP, [], ("<answer> Velmora",), END),  # never closed
        (TWO_HOP, [FILM, ADA], ("<answer> </answer>",), END),  # empty
        (TWO_HOP, [FILM, ADA], ("<answer> Ta",), {"ending": Ending.LENGTH}),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("failure", "case"), [(name, case) for name, own in CASES.items() for case in own])
def test_hand_made_episodes(tokenizer: PreTrainedTokenizerFast, failure: Failure, case: Case) -> None:
    question, searches, rest, how = case
    made = episode(tokenizer, question, searches, *rest, **how)
    assert first_failure(made, question, made.turn_texts(tokenizer.decode)) is failure


def test_a_golden_answer_inside_a_word_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    made = episode(tokenizer, TWO_HOP, [FILM, ADA], "<answer> Velmorans </answer>")
    assert first_failure(made, TWO_HOP, made.turn_texts(tokenizer.decode)) is Failure.EVIDENCE_NOT_USED


SEARCHES = st.lists(
    st.builds(
        search,
        st.sampled_from(["director of Silent Harbour", "Ada Quill", "who?", "Tarn"]),
        st.sampled_from(["1", "2", "8"]),
        hit=st.booleans(),
    ),
    max_size=4,
)
TURNS = st.lists(
    st.sampled_from(
        ["", "<answer>", "</answer>", "<search> Tarn </search>", "Velmora", "<answer> x </answer>"]
    ),
    max_size=4,
)


@given(
    seed=st.integers(0, 999),
    question=st.sampled_from([ONE_HOP, TWO_HOP, UNKNOWN]),
    searches=SEARCHES,
    turns=TURNS,
    outcome=st.sampled_from(Outcome),
    ending=st.sampled_from(Ending),
    prediction=st.sampled_from([None, "", "Velmora", "Tarn"]),
)
def test_exactly_one_failure_for_each_wrong_episode_and_none_for_others(
    seed: int,
    question: Question,
    searches: list[Search],
    turns: list[str],
    outcome: Outcome,
    ending: Ending,
    prediction: str | None,
) -> None:
    made = replace(
        random_episode(seed), searches=searches, outcome=outcome, ending=ending, prediction=prediction
    )
    found = first_failure(made, question, turns)
    assert isinstance(found, Failure) == (outcome is Outcome.WRONG)


@given(st.integers(0, 10_000))
def test_random_episodes_through_the_table(seed: int) -> None:
    made = random_episode(seed)
    question = Question(made.question_id, made.question, tuple(made.golden_answers))
    (row,) = as_table(diagnose([made], {("onehop", question.id): question}, str)).to_pylist()
    assert (row["first_failure"] is None) == made.correct
    assert (row["without_evidence"] is None) == (not made.correct)


def test_table_of_every_outcome(tokenizer: PreTrainedTokenizerFast) -> None:
    right = episode(tokenizer, TWO_HOP, [FILM, ADA], "<answer> Velmora </answer>")
    wrong = replace(episode(tokenizer, ONE_HOP, [FILM], WRONG), dataset="other")
    failed = replace(wrong, question_id="two", outcome=Outcome.FAILED, failure="the index is down")
    questions = {("set", "two"): TWO_HOP, ("other", "one"): ONE_HOP, ("other", "two"): TWO_HOP}
    table = as_table(diagnose([right, wrong, failed], questions, tokenizer.decode))
    assert table.schema == SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("set", "two", "correct", None, False, False, False),
        ("other", "one", "wrong", "evidence_not_used", None, False, False),
        ("other", "two", "failed", None, None, None, None),
    ]
    assert diagnose([failed], questions, tokenizer.decode)[0].flags == HackingFlags()


def test_attempts_are_answers_in_any_shape() -> None:
    assert answer_attempts(["<answer> a <answer> b </answer>", "<answer></answer>", "<answer> c"]) == [
        "a", "b", "", "c"
    ]  # fmt: skip
    assert answer_attempts(["<think> d </think>", "e </answer>", "<answer> f<search> g </search>"]) == ["f"]
    assert answer_attempts([]) == []
