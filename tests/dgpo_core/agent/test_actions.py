"""Parsing of what a model wrote."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.agent.actions import ActionKind, is_well_formed, last_answer, parse_action
from dgpo_core.agent.prompts import TAGS

WORDS = st.text("abc <>/\n", max_size=6)
SOUP = st.lists(st.sampled_from(TAGS) | st.text(max_size=5), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "kind", "content"),
    [
        ("<think> x </think>\n<search> capital of France </search>", "search", "capital of France"),
        ("<answer>Paris</answer>", "answer", "Paris"),
        ("<answer>\nParis\n\n</answer>", "answer", "Paris"),
        ("<search>a</search><answer>b</answer>", "search", "a"),
        ("<answer>b</answer><search>a</search>", "answer", "b"),
        ("<search> never closed <answer> b </answer>", "answer", "b"),
        ("<answer> b </search>", "invalid", ""),
        ("<search>  </search>", "invalid", ""),
        ("<Search>a</Search>", "invalid", ""),
        ("", "invalid", ""),
    ],
)
def test_first_complete_tag_is_the_action(text: str, kind: str, content: str) -> None:
    action = parse_action(text)
    assert (action.kind, action.content) == (kind, content)


@given(SOUP)
def test_any_text_parses(text: str) -> None:
    action = parse_action(text)
    assert (action.kind is ActionKind.INVALID) == (action.content == "")
    assert action.content == action.content.strip()
    if action.kind is not ActionKind.INVALID:
        assert f"</{action.kind}>" not in action.content
        assert f"<{action.kind}>" in text
    answer = last_answer(text)
    assert answer is None or (answer and "</answer>" in text.partition("<answer>")[2])
    assert isinstance(is_well_formed([text]), bool)


@given(
    st.text("ab ", max_size=5),
    st.text("ab", min_size=1, max_size=5),
    st.sampled_from(["search", "answer"]),
    SOUP,
)
def test_what_follows_the_first_tag_does_not_matter(before: str, content: str, tag: str, after: str) -> None:
    action = parse_action(f"{before}<{tag}>{content}</{tag}>{after}")
    assert (action.kind, action.content) == (tag, content)


def test_last_answer() -> None:
    assert last_answer("<answer> a </answer> then <answer> b </answer> <answer> open") == "b"
    assert last_answer("<answer> a </answer> <answer> \n</answer>") is None
    assert last_answer("<answer>\u200b</answer>") is None
    assert last_answer("<answer> open") is None


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["<think>a</think><answer>b</answer>"], True),
        (["\n<think>a</think>\n<search>b</search>", "<think>c</think> <answer>d</answer>\n"], True),
        (["<think>a</think><search>b</search>"], False),
        (["<answer>b</answer>"], False),
        (["<think>a</think> so <answer>b</answer>"], False),
        (["<think>a</think> so <think>a</think><answer>b</answer>"], False),
        (["<think>a<search>x</think><answer>b</answer>"], False),
        (["<think>a</think><answer>b</answer>", "<think>a</think><answer>b</answer>"], False),
        (["<think>a</think>", "<think>a</think><answer>b</answer>"], False),
        (["<think>a</think><answer>b</answer> bye"], False),
        (["<think></think><answer></answer>"], True),
        ([], False),
    ],
)
def test_is_well_formed(turns: list[str], expected: bool) -> None:
    assert is_well_formed(turns) is expected
