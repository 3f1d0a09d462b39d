"""Kinds of a text do not depend on how it is cut into chunks; the oracle splits the whole text."""

import re
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.agent.prompts import TAGS
from dgpo_core.serving.events import Piece, TagSplitter

FRAGMENTS = st.sampled_from(
    [*TAGS, "<", ">", "</", "<thin", "</answer", "think>", "<b>", " a ", "<<search>", "é"]
)
KINDS = {"think": "think", "search": "search", "answer": "answer", "information": "forged"}


def whole(text: str) -> list[tuple[str, str]]:
    """Kind and text between two tags, without empty ones."""
    kind, pieces = "text", []
    for part in re.split("(" + "|".join(map(re.escape, TAGS)) + ")", text):
        if part in TAGS:
            kind = "text" if part.startswith("</") else KINDS[part.strip("<>")]
        elif part:
            pieces.append((kind, part))
    return pieces


def split(chunks: list[str]) -> list[Piece]:
    splitter = TagSplitter()
    return [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.close()


@given(st.lists(FRAGMENTS, max_size=12).map("".join), st.lists(st.integers(0, 60), max_size=12))
def test_any_chunking_gives_the_kinds_of_the_whole_text(text: str, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    chunks = [text[start:end] for start, end in pairwise(ends)]
    expected = whole(text)
    for cut in (chunks, [text], list(text)):
        pieces = split(cut)
        assert not any(tag in piece for _, piece in pieces for tag in TAGS)
        assert merged(pieces) == merged(expected)


def merged(pieces: list[Piece] | list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(pieces, lambda p: p[0])]


@pytest.mark.parametrize(
    "chunks", [["<thi", "nk>a</thi", "nk>"], list("<think>a</think>"), ["<think>a</think>"]]
)
def test_no_part_of_a_tag_is_told(chunks: list[str]) -> None:
    assert merged(split(chunks)) == [("think", "a")]


def test_only_what_may_become_a_tag_is_held_back() -> None:
    splitter = TagSplitter()
    assert splitter.feed("<answer>5 < 7 and 7 <") == [("answer", "5 < 7 and 7 ")]
    assert splitter.feed("b") == [("answer", "<b")]
    assert splitter.feed("</answe") == []
    assert splitter.close() == [("answer", "</answe")], "the turn ended here: it was none"


def test_an_unclosed_thought_ends_where_the_next_tag_opens() -> None:
    assert split(["<think>a<search>b</search>c"]) == [("think", "a"), ("search", "b"), ("text", "c")]


def test_what_the_model_passes_off_as_retrieved_is_marked() -> None:
    assert split(["<information>Doc 1</information>"]) == [("forged", "Doc 1")]
