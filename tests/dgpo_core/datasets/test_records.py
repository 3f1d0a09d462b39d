"""Corpus and question files."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_core.datasets.records import Passage, Question, UniqueIds, read_corpus, read_questions, write_jsonl
from dgpo_core.errors import UserError
from dgpo_core.text import trimmed

TEXT = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]), min_size=1, max_size=12)
FILLED = TEXT.filter(trimmed)
GOOD = {"id": "q1", "question": "Who?", "golden_answers": ["Ada"]}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.tuples(TEXT.filter(lambda t: "\n" not in t), TEXT), max_size=4))
def test_corpus_round_trip(tmp_path: Path, texts: list[tuple[str, str]]) -> None:
    passages = [Passage(str(i), title, text) for i, (title, text) in enumerate(texts)]
    write_jsonl(tmp_path / "c.jsonl", passages)
    assert list(read_corpus(tmp_path / "c.jsonl")) == passages


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(st.tuples(FILLED, st.lists(FILLED, min_size=1, max_size=2)), min_size=1, max_size=4))
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
        ("\ufeff" + json.dumps({"id": "2", "contents": '"T"\nx'}), "BOM"),
        ("[1]", "a line must be a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": 1, "contents": "T\\ny"}', "id '1' was used on an earlier line"),
        ('{"id": "2", "contents": "T\\n\\ud800"}', "surrogates not allowed"),
        (json.dumps({"contents": '"T"\nx'}), 'key "id" is missing; its keys are "contents"'),
        (json.dumps({"id": [1], "contents": '"T"\nx'}), 'key "id"'),
        (json.dumps({"id": "2", "body": "x"}), 'its keys are "id", "body"'),
        (json.dumps({"id": "2", "text": "x"}), 'beside "text" a string "title" is wanted'),
        (json.dumps({"id": "2", "title": "x", "text": " "}), 'key "text" must be a non-empty string'),
        (json.dumps({"id": "2", "contents": " \u200b\n"}), 'key "contents" must be a non-empty string'),
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
        ({"golden_answers": ["", " \u200b"]}, "of at least one string that is not empty"),
        ({"golden_answers": [1990.0]}, 'but holds 1990.0: write "1990.0"'),
        ({"golden_answers": [True]}, "but holds true"),
        ({"golden_answers": None}, "but holds null"),
        ({"golden_answers": {"text": ["Ada"]}}, 'but holds {"text"'),
        ({"golden_answers": '["Ada"]'}, "is a list written as a string"),
        ({"golden_answers": ["\ud800"]}, "surrogates not allowed"),
        ({"question": "\ud800"}, "surrogates not allowed"),
        ({"metadata": {"long_answers": ["\udfff"]}}, "surrogates not allowed"),
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
    with pytest.raises(UserError, match=r"q\.jsonl:1: not in UTF-8, save the file so: .*utf-8"):
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


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps(GOOD | {"question": "Who \U0001f600?"}))
    assert read_questions(tmp_path / "q.jsonl")[0].question == "Who \U0001f600?"


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_marks_blank_lines_and_line_ends_of_editors(tmp_path: Path, name: str) -> None:
    """A byte order mark; lines of white space alone, of every kind; Windows' line ends around and inside."""
    rows = [
        json.dumps({"id": i, "contents": f'"Town {i}"\r\nIt lies there.\r\nIt is old.'}) for i in range(3)
    ]
    lines = ["\ufeff", rows[0], "", " \t", "\u00a0\u2028", rows[1], rows[2], "\x0c", ""]
    text = "\r\n".join(lines).encode()
    assert text.startswith(codecs.BOM_UTF8)
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert list(read_corpus(tmp_path / name)) == [
        Passage(str(i), f"Town {i}", "It lies there.\nIt is old.") for i in range(3)
    ]


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    good, again = json.dumps(GOOD), json.dumps(GOOD | {"id": "q2"})
    path.write_text(f"\n{good}\n\n{again}\n\n{{\n")
    with pytest.raises(UserError, match=r"q\.jsonl:6: not JSON"):
        read_questions(path)
    path.write_text(f"\n{good}\n\n{again}\n\n{good}\n")
    with pytest.raises(UserError, match=r"q\.jsonl:6: id 'q1' was used on line 2 before"):
        read_questions(path)


@pytest.mark.parametrize("behind", ["", "\r", " ", "\t\u00a0", "\u200b", "\ufeff \r"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_titles_lose_what_nobody_sees_around_them(behind: str, quote: str) -> None:
    row = {"id": "0", "contents": f"{behind}{quote}Town 0{quote}{behind}\nIt lies there."}
    assert Passage.from_json(row) == Passage("0", "Town 0", "It lies there.")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 0, "title": "Town", "text": "It lies\r\nthere."}, Passage("0", "Town", "It lies\nthere.")),
        ({"_id": "d1", "title": "", "text": "x", "metadata": {}}, Passage("d1", "", "x")),
        ({"docid": "d1", "title": " A\nB ", "text": "x"}, Passage("d1", "A B", "x")),
        ({"docid": "d1", "contents": "T\nx"}, Passage("d1", "T", "x")),
        (
            {"id": "1", "docid": "d", "contents": "T\nx", "title": "other", "text": "y"},
            Passage("1", "T", "x"),
        ),
    ],
)
def test_other_forms_of_passages(row: dict[str, Any], expected: Passage) -> None:
    passage = Passage.from_json(row)
    assert passage == expected
    assert Passage.from_json(passage.to_json()) == passage


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"golden_answers": "Ada"}, ("Ada",)),
        ({"golden_answers": [1990, "in 1990"]}, ("1990", "in 1990")),
        ({"golden_answers": 7}, ("7",)),
        ({"answer": ["Ada", "Ada L."]}, ("Ada", "Ada L.")),
        ({"answer": "Ada", "answer_aliases": ["Ada L."]}, ("Ada", "Ada L.")),
        ({"answers": ["Ada"]}, ("Ada",)),
        ({"golden_answers": ["Ada"], "answer": "Bob"}, ("Ada",)),
    ],
)
def test_other_forms_of_questions(tmp_path: Path, row: dict[str, Any], answers: tuple[str, ...]) -> None:
    """Without an id, as NQ-open's, a question has the number of its line."""
    path = tmp_path / "q.jsonl"
    path.write_text("\n" + json.dumps({"question": "Who?", **row}))
    assert read_questions(path) == [Question("2", "Who?", answers)]


def test_two_kinds_of_answers_are_ambiguous() -> None:
    with pytest.raises(ValueError, match='has both "answer" and "answers"'):
        Question.from_json({"id": "1", "question": "Who?", "answer": "Ada", "answers": ["Bob"]})


def test_numbers_of_any_size_are_ids(tmp_path: Path) -> None:
    large = "9" * 4000
    path = tmp_path / "c.jsonl"
    path.write_text(f'{{"id": {large}, "contents": "T\\nx"}}\n{{"id": {large}0000, "contents": "T\\nx"}}\n')
    assert next(read_corpus(path)).id == large
    path.write_text(f'{{"id": {large}{large}, "contents": "T\\nx"}}\n')
    with pytest.raises(UserError, match=r"c\.jsonl:1: .*digits"):
        list(read_corpus(path))
