"""Evidence and queries of hand-made episodes, their first failures and their hacking flags."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Ending, Outcome, Search
from dgpo_core.datasets.records import Question
from dgpo_core.evaluation.diagnosis import (
    ANY_HIT,
    SCHEMA,
    Failure,
    HackingFlags,
    answer_attempts,
    content_words,
    diagnose,
    first_failure,
    hacking_flags,
    is_sensible,
    missing_evidence,
    needed,
    new_evidence,
    repeats,
)
from tests.dgpo_core.evaluation.episodes import ONE_HOP, TWO_HOP, UNKNOWN, episode, search
from tests.dgpo_core.making import random_episode

RIGHT = "<answer> Velmora </answer>"
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
        (TWO_HOP, [FILM, ADA], ("<answer> Velmorans </answer>",), {}),  # a golden answer inside a word
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
    (row,) = diagnose([made], {("onehop", question.id): question}, str).to_pylist()
    assert (row["first_failure"] is None) == made.correct
    assert (row["without_evidence"] is None) == (not made.correct)


def test_table_of_every_outcome(tokenizer: PreTrainedTokenizerFast) -> None:
    right = episode(tokenizer, TWO_HOP, [FILM, ADA], "<answer> Velmora </answer>")
    wrong = replace(episode(tokenizer, ONE_HOP, [FILM], WRONG), dataset="other")
    failed = replace(wrong, question_id="two", outcome=Outcome.FAILED, failure="the index is down")
    questions = {("set", "two"): TWO_HOP, ("other", "one"): ONE_HOP, ("other", "two"): TWO_HOP}
    table = diagnose([right, wrong, failed], questions, tokenizer.decode)
    assert table.schema == SCHEMA
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("set", "two", "correct", None, False, False, False),
        ("other", "one", "wrong", "evidence_not_used", None, False, False),
        ("other", "two", "failed", None, None, None, None),
    ]


def test_attempts_are_answers_in_any_shape() -> None:
    assert answer_attempts(["<answer> a <answer> b </answer>", "<answer></answer>", "<answer> c"]) == [
        "a", "b", "", "c"
    ]  # fmt: skip
    assert answer_attempts(["<think> d </think>", "e </answer>", "<answer> f<search> g </search>"]) == ["f"]
    assert answer_attempts([]) == []


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, {ANY_HIT}),
        ({"golden_passages": []}, {ANY_HIT}),
        ({"golden_passages": [{"id": "1"}, {"title": "B"}]}, {ANY_HIT}),
        ({"golden_passages": [{"id": "1"}]}, {"1"}),
    ],
)
def test_all_gold_passages_or_any_hit(metadata: dict[str, Any], expected: set[str]) -> None:
    assert needed(Question("q", "Who?", ("x",), metadata)) == expected


def test_each_piece_of_evidence_counts_for_the_search_that_found_it_first() -> None:
    searches = [search("a", "1", "9"), search("b", "1", hit=True), search("c", "2", "1")]
    assert new_evidence(TWO_HOP, searches) == [{"1"}, frozenset(), {"2"}]
    assert missing_evidence(TWO_HOP, searches[:2]) == {"2"}
    assert not missing_evidence(TWO_HOP, searches)
    assert new_evidence(UNKNOWN, searches) == [frozenset(), {ANY_HIT}, frozenset()]
    assert missing_evidence(UNKNOWN, []) == {ANY_HIT}


def test_content_words() -> None:
    assert content_words("Who is the director\N{RIGHT SINGLE QUOTATION MARK}s wife? Ada's.") == {
        "director", "wife", "ada"
    }  # fmt: skip
    assert content_words("what is it?") == frozenset()


def test_repeats_ignores_case_and_punctuation() -> None:
    assert repeats("Where was Ada born?", ["where was ada born"])
    assert not repeats("Ada born", ["where was ada born"])


@pytest.mark.parametrize(
    ("query", "earlier", "missing", "expected"),
    [
        ("Silent Harbour", [], {"1", "2"}, True),
        ("born director", [], {"1", "2"}, False),
        ("who made silent harbour?", ["Silent Harbour"], {"1", "2"}, True),
        ("silent harbour", ["Silent Harbour?"], {"1", "2"}, False),
        ("Ada Quill", ["Silent Harbour"], {"2"}, True),
        ("Ada", ["Silent Harbour"], {"2"}, False),
        ("director of Silent Harbour", ["Silent Harbour"], {"2"}, False),  # its passage is there already
        ("Ada Quill", [], {"1", "2"}, False),  # nothing has named her yet
    ],
)
def test_sensible_names_a_missing_passage(
    query: str, earlier: list[str], missing: set[str], expected: bool
) -> None:
    assert is_sensible(query, TWO_HOP, earlier, frozenset(missing)) is expected


def test_what_stands_in_brackets_is_no_part_of_a_name() -> None:
    assert not is_sensible("the film Harbour", ONE_HOP, [], frozenset({"1"}))
    assert is_sensible("the film Silent Harbour", ONE_HOP, [], frozenset({"1"}))


def test_a_title_that_nothing_names_leaves_any_content_word() -> None:
    passage = {"id": "7", "title": "Discography", "text": "..."}
    question = Question("q", "who sings the harbour song", ("Ada",), {"golden_passages": [passage]})
    assert is_sensible("harbour song singer", question, [], frozenset({"7"}))
    assert not is_sensible("who is the president", question, [], frozenset({"7"}))


def test_without_gold_passages_only_a_first_query_must_share_a_word() -> None:
    assert not is_sensible("Ada Quill", UNKNOWN, [], frozenset())
    assert is_sensible("Ada Quill", UNKNOWN, ["Silent Harbour"], frozenset())
    assert not is_sensible("who is it", UNKNOWN, ["Silent Harbour"], frozenset())


@pytest.mark.parametrize(
    ("question", "searches", "last", "expected"),
    [
        (TWO_HOP, [FILM, ADA], RIGHT, (False, False, False)),
        (TWO_HOP, [ADA], RIGHT, (True, False, False)),  # half of the evidence
        (UNKNOWN, [ADA], RIGHT, (False, False, False)),
        (UNKNOWN, [FILM], RIGHT, (True, False, False)),
        (TWO_HOP, [], RIGHT, (True, None, False)),
        (TWO_HOP, [FILM], WRONG, (None, False, False)),
        (TWO_HOP, [FILM, search(TWO_HOP.question + "?", "1")], WRONG, (None, True, False)),
        (TWO_HOP, [FILM, ADA], f"<answer> Tarn {RIGHT}", (False, False, True)),
    ],
)
def test_flags(
    tokenizer: PreTrainedTokenizerFast,
    question: Question,
    searches: list[Search],
    last: str,
    expected: tuple[bool | None, ...],
) -> None:
    made = episode(tokenizer, question, searches, last)
    assert hacking_flags(made, question, made.turn_texts(tokenizer.decode)) == HackingFlags(*expected)
