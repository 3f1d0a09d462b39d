"""Searches, thinking and decisions of hand-made episodes, and what must hold of any."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Ending, Outcome, Search
from dgpo_core.evaluation.search_use import (
    LONGEST,
    LOOP,
    MEASUREMENTS,
    as_table,
    deciding,
    loops,
    searching,
    thinking,
    thought,
    use_of_search,
)
from tests.dgpo_core.evaluation.episodes import ONE_HOP, TWO_HOP, UNKNOWN, episode, search

FILM, ADA = search("film", "1", "8"), search("Ada Quill", "2", hit=True)
MISS, NONE = search("nothing", "8"), search("nothing at all")
ANSWER, ASKS, MUSES = "<answer> Velmora </answer>", "<search> more </search>", "<think> hm </think>"


@pytest.mark.parametrize(
    ("question", "searches", "nothing_new", "no_evidence"),
    [
        (TWO_HOP, [], (0, 0), (0, 0)),
        (TWO_HOP, [FILM, ADA], (0, 1), (0, 2)),
        (TWO_HOP, [FILM, MISS, ADA], (1, 2), (1, 3)),
        (TWO_HOP, [FILM, NONE], (1, 1), (1, 2)),  # a search that finds nothing brings nothing new
        (TWO_HOP, [NONE], (0, 0), (1, 1)),  # the first search is none after the first
        (TWO_HOP, [FILM, ADA, search("both", "2", "1"), search("third", "1", "9")], (1, 3), (2, 4)),
        (UNKNOWN, [MISS, ADA, search("Ada again", "3", hit=True)], (0, 2), (2, 3)),  # a hit is the evidence
    ],
)
def test_searches_that_bring_nothing(
    question: object, searches: list[Search], nothing_new: tuple[int, int], no_evidence: tuple[int, int]
) -> None:
    assert searching(question, searches) == {  # type: ignore[arg-type]
        "searches_nothing_new": nothing_new,
        "searches_no_evidence": no_evidence,
    }


def test_thought_is_what_stands_in_the_tag() -> None:
    assert thought("before <think> one </think> between <think> two <answer> x </answer>") == "one   two"
    assert thought("<answer> x </answer>") == thought("<think> </think>") == ""


@pytest.mark.parametrize(
    ("thoughts", "kind"),
    [
        (["Who directed the film?", "", "of the", "It was Ada."], "thinking_empty"),
        (["who directed the FILM, Silent Harbour?", "Ada."], "thinking_question"),
        (["I need the film.", "Ada.", "I need a film"], "thinking_repeated"),  # articles tell nothing apart
        (["It is in in in the city.", "Ada."], "thinking_loop"),
        (["I see. I see, I see", "Ada."], "thinking_loop"),
    ],
)
def test_kinds_of_degenerate_thinking(thoughts: list[str], kind: str) -> None:
    turns = [f"<think> {text} </think><search> Ada </search>" for text in thoughts]
    found = thinking("Who directed the film Silent Harbour", turns)
    others = {name for name, (events, _) in found.items() if events}
    assert others == {"thinking_degenerate", kind}
    assert found[kind][1] == len(turns)


words = st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=12)
distinct = st.lists(st.integers(0, 999).map(lambda n: f"w{n}"), min_size=1, max_size=LONGEST, unique=True)


@given(words, distinct, words, st.integers(LOOP, 5))
def test_any_words_often_enough_in_a_row_are_a_loop(
    before: list[str], block: list[str], after: list[str], times: int
) -> None:
    assert loops(" ".join([*before, *(block * times), *after]))


@given(distinct, distinct)
def test_words_at_most_twice_in_a_row_are_none(block: list[str], others: list[str]) -> None:
    between = [f"x{word}" for word in others]
    assert not loops(" ".join(block * (LOOP - 1) + between + block))


@given(st.lists(st.text("ab <>/think?", max_size=20), max_size=6), st.text("ab", max_size=5))
def test_a_turn_is_degenerate_in_one_way_or_not_at_all(turns: list[str], question: str) -> None:
    found = thinking(question, [f"<think>{turn}</think>" for turn in turns])
    total, _ = found.pop("thinking_degenerate")
    assert total == sum(events for events, _ in found.values()) <= len(turns)
    twice = thinking(question, [f"<think>{turn}</think>" for turn in turns * 2])
    assert twice["thinking_degenerate"][0] == total + len(turns), "all second ones repeat, if nothing else"


@pytest.mark.parametrize(
    ("searches", "rest", "ending", "right", "early", "long", "neither"),
    [
        ([], [ANSWER], Ending.ANSWERED, (0, 0), (0, 0), (0, 0), (0, 0)),
        ([FILM], [ANSWER], Ending.ANSWERED, (0, 1), (1, 1), (0, 0), (0, 1)),
        ([FILM, ADA], [ANSWER], Ending.ANSWERED, (2, 2), (0, 1), (0, 1), (0, 2)),
        ([FILM, ADA], [MUSES, ANSWER], Ending.ANSWERED, (2, 2), (0, 1), (0, 1), (0, 2)),
        ([FILM, ADA, MISS], [ANSWER], Ending.ANSWERED, (2, 3), (0, 1), (1, 2), (0, 3)),
        ([FILM, ADA], [ASKS], Ending.BUDGET, (1, 2), (0, 1), (1, 1), (0, 2)),
        ([FILM], [ASKS], Ending.BUDGET, (1, 1), (0, 1), (0, 0), (0, 1)),
        ([FILM], [MUSES], Ending.BUDGET, (0, 1), (0, 1), (0, 0), (1, 1)),
        ([FILM, ADA], [], Ending.LENGTH, (1, 2), (0, 1), (0, 1), (1, 2)),
    ],
)
def test_decisions_beside_the_oracle(
    tokenizer: PreTrainedTokenizerFast,
    searches: list[Search],
    rest: list[str],
    ending: Ending,
    right: tuple[int, int],
    early: tuple[int, int],
    long: tuple[int, int],
    neither: tuple[int, int],
) -> None:
    made = episode(tokenizer, TWO_HOP, searches, *rest, ending=ending)
    assert deciding(made, TWO_HOP, made.turn_texts(tokenizer.decode)) == {
        "decisions_right": right,
        "answered_too_early": early,
        "searched_too_long": long,
        "decisions_neither": neither,
    }


@given(
    searches=st.lists(st.sampled_from([FILM, ADA, MISS, NONE]), max_size=5),
    rest=st.lists(st.sampled_from([ASKS, MUSES]), max_size=2),
    ending=st.sampled_from([Ending.ANSWERED, Ending.BUDGET, Ending.LENGTH]),
)
def test_every_decision_is_right_early_late_or_none(
    tokenizer: PreTrainedTokenizerFast, searches: list[Search], rest: list[str], ending: Ending
) -> None:
    last = [ANSWER] if ending is Ending.ANSWERED else rest
    made = episode(tokenizer, TWO_HOP, searches, *last, ending=ending)
    found = deciding(made, TWO_HOP, made.turn_texts(tokenizer.decode))
    assert sum(events for events, _ in found.values()) == len(searches)
    assert found["answered_too_early"][1] + found["searched_too_long"][1] == len(searches)


def test_every_count_of_every_episode_is_a_row(tokenizer: PreTrainedTokenizerFast) -> None:
    lost = replace(episode(tokenizer, ONE_HOP, [FILM]), outcome=Outcome.FAILED)
    made = [episode(tokenizer, TWO_HOP, [FILM], ANSWER), lost]
    asked = {("set", each.id): each for each in (ONE_HOP, TWO_HOP)}
    rows = as_table(use_of_search(made, asked, tokenizer.decode)).to_pylist()
    names = [name for name in MEASUREMENTS if not name.startswith("em_")]
    assert [row["measurement"] for row in rows] == names * 2
    assert [row["failed"] for row in rows] == [False] * len(names) + [True] * len(names)
    assert {(row["dataset"], row["question_id"]) for row in rows} == {("set", "one"), ("set", "two")}
