"""Corpus and question files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_core.datasets.records import Passage, Question, UniqueIds, read_corpus, read_questions, write_jsonl
from dgpo_core.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
FILLED = TEXT.filter(str.strip)
GOOD = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.tuples(TEXT.filter(lambda t: "\n" not in t), TEXT), max_size=4))
def test_corpus_round_trip(tmp_path: Path, texts: list[tuple[str, str]]) -> None:
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(texts)]
    write_jsonl(tmp_path / "c.jsonl", passages)
    assert list(read_corpus(tmp_path / "c.jsonl")) == passages


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.tuples(FILLED, st.lists(TEXT, min_size=1, max_size=2)), min_size=1, max_size=4))
def test_questions_round_trip(tmp_path: Path, rows: list[tuple[str, list[str]]]) -> None:
    questions = [Question(str(i), text, tuple(golden), {"n": [i]}) for i, (text, golden) in enumerate(rows)]
    write_jsonl(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions


def test_published_form_of_a_passage(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": 7, "contents": "\\"A \\"B\\" C\\"\\nline one\\nline two"}\n')
    assert list(read_corpus(path)) == [Passage("7", 'A "B" C', "line one\nline two")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[1]", "a line must be a JSON object"),
        (json.dumps({"contents": '"T"\nx'}), 'key "id"'),
        (json.dumps({"id": True, "contents": '"T"\nx'}), 'key "id"'),
        (json.dumps({"id": "2"}), 'key "contents" must be a non-empty string'),
        (json.dumps({"id": "2", "contents": "no title"}), "has no line break"),
    ],
)
def test_bad_passage_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"id": "1", "contents": "\\"T\\"\\nx"}\n' + line + "\n")
    passages = read_corpus(path)
    assert next(passages).id == "1"
    with pytest.raises(UserError) as caught:
        next(passages)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, 'key "id"'),
        ({"question": "  "}, 'key "question" must be a non-empty string'),
        ({"golden_answers": []}, 'key "golden_answers" must be a list of at least one string'),
        ({"golden_answers": "Ada"}, 'key "golden_answers"'),
        ({"golden_answers": [1]}, 'key "golden_answers"'),
        ({"metadata": [1]}, 'key "metadata" must be an object'),
        ({"id": "q1"}, "id 'q1' was used on line 1 before"),
    ],
)
def test_bad_question_names_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, {**GOOD, "id": "q2", **change})))
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_missing_empty_and_undecodable_files(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    with pytest.raises(UserError, match=r"q\.jsonl: no such file"):
        read_questions(path)
    path.write_text("")
    with pytest.raises(UserError, match="no questions in this file"):
        read_questions(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"q\.jsonl:1: .*utf-8"):
        read_questions(path)


@given(st.lists(st.sampled_from(["0", "1", "2", "3", "7", "07", "-1", "x", "٣", "1" * 20]), max_size=12))
def test_unique_ids_are_those_of_a_set(names: list[str]) -> None:
    ids, seen = UniqueIds(), set()
    for name in names:
        assert ids.add(name) == (name not in seen)
        seen.add(name)


def test_counted_ids_take_no_memory() -> None:
    ids = UniqueIds()
    assert all(ids.add(str(i)) for i in range(5, 500))
    assert not ids._others
    assert not ids.add("5")
    assert ids.add("4")


@pytest.mark.parametrize("key", ["question", "golden_answers"])
def test_text_that_no_file_can_hold(tmp_path: Path, key: str) -> None:
    """JSON can escape half of a surrogate pair, which UTF-8 cannot write."""
    row = GOOD | {key: "\ud800" if key == "question" else ["\ud800"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"q\.jsonl:1: .*surrogates not allowed"):
        read_questions(tmp_path / "q.jsonl")
