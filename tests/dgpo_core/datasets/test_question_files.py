"""Questions in every form in which people keep them: what is read, and what is refused with which words."""

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgpo_core.datasets.question_files import QuestionForm, read_question_files
from dgpo_core.datasets.records import Question
from dgpo_core.errors import UserError
from dgpo_core.text import trimmed

PARAGRAPHS = [["Ada", ["Ada was born. ", "She wrote."]], ["Bob", ["Bob was not."]], ["Cid", ["Cid too."]]]
HOTPOT = {
    "_id": "5a7",
    "question": "Who wrote?",
    "answer": "Ada",
    "supporting_facts": [["Cid", 0], ["Ada", 1], ["Ada", 0], ["Gone", 0]],
    "context": PARAGRAPHS,
    "type": "bridge",
}
GOLD = [{"title": "Cid", "text": "Cid too."}, {"title": "Ada", "text": "Ada was born. She wrote."}]
AS_OBJECTS = {
    "supporting_facts": {"title": ["Cid", "Ada"], "sent_id": [0, 1]},
    "context": {"title": [title for title, _ in PARAGRAPHS], "sentences": [texts for _, texts in PARAGRAPHS]},
}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def read(path: Path, **columns: str | int) -> list[Question]:
    return read_question_files("mine", [path], QuestionForm(columns))[0]


def asked(path: Path, **columns: str | int) -> list[tuple[str, tuple[str, ...]]]:
    return [(question.question, question.golden_answers) for question in read(path, **columns)]


EXPECTED = [("Who?", ("Ada", "Ada L.")), ("When?", ("1990",))]
TEXTS = {
    "a.jsonl": '{"question": "Who?", "golden_answers": ["Ada", "Ada L."]}\n'
    '{"query": "When?", "answer": 1990}\n',
    "b.json": '[{"question": "Who?", "answers": ["Ada", "Ada L."]},\n'
    '{"question": "When?", "answer": "1990"}]\n',
    "c.json": '{"version": 1, "data": [{"question": "Who?", "answer": "Ada", "answer_aliases": ["Ada L."]},'
    ' {"q": "When?", "a": 1990.0}]}',
    "lines.json": '{"question": "Who?", "answer": {"value": "Ada", "aliases": ["Ada L."], "type": "x"}}\n'
    '{"question": "When?", "answer": {"text": ["1990"], "answer_start": [4]}}\n',
    "list.jsonl": '[{"Question": "Who?", "Golden Answers": "[\'Ada\', \'Ada L.\']"},'
    ' {"Question": "When?", "Golden Answers": [1990]}]',
    "d.csv": 'Question,Answers,note\nWho?,"[""Ada"", ""Ada L.""]",x\n"When?",1990,"two\nlines"\n',
    "semicolons.csv": "question;answer\nWho?;['Ada', \"Ada L.\"]\nWhen?;1990\n",
    "tabs.csv": "question\tanswer\nWho?\t['Ada', 'Ada L.']\nWhen?\t[1990]\n",
    "e.tsv": "question\tanswer\nWho?\t\"['Ada', 'Ada L.']\"\nWhen?\t1990\n",
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
def test_forms_of_text_with_what_editors_and_spreadsheets_add(
    tmp_path: Path, name: str, ends: str, packed: bool
) -> None:
    """A byte order mark, blank lines, Windows' line ends, gzip."""
    lines = (
        TEXTS[name].split("\n") if name != "d.csv" else TEXTS[name].replace("two\nlines", "one").split("\n")
    )
    text = codecs.BOM_UTF8 + ends.join([*lines, "", " "]).encode()
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text) if packed else text)
    assert asked(path) == EXPECTED


def test_a_cell_of_two_lines(tmp_path: Path) -> None:
    assert asked(write(tmp_path / "d.csv", TEXTS["d.csv"])) == EXPECTED


CELLS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(trimmed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(st.tuples(CELLS, st.lists(CELLS, min_size=1, max_size=3)), min_size=1, max_size=4), st.booleans()
)
def test_any_list_in_a_cell_comes_back(
    tmp_path: Path, rows: list[tuple[str, list[str]]], as_json: bool
) -> None:
    text = io.StringIO()
    spelled = [(question, json.dumps(golden) if as_json else repr(golden)) for question, golden in rows]
    csv.writer(text).writerows([("question", "golden_answers"), *spelled])
    path = write(tmp_path / "q.csv", text.getvalue())
    assert asked(path) == [(trimmed(q), tuple(map(trimmed, golden))) for q, golden in rows]


def test_parquet_as_search_r1_writes_it(tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": "train_0", "question": "Who?", "golden_answers": ["Ada"]}
    row |= {"prompt": [{"role": "user", "content": "Answer ... Who?"}], "extra_info": {"index": 0}}
    row |= {"reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", "Ada L."]}}}
    without = {key: value for key, value in row.items() if key != "golden_answers"} | {"id": "train_1"}
    pq.write_table(
        pa.Table.from_pylist([row, {**row, **without, "golden_answers": None}]), tmp_path / "a.parquet"
    )
    pq.write_table(pa.Table.from_pylist([without]), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [Question("train_1", "Who?", ("Ada", "Ada L."))]
    with pytest.raises(
        UserError, match=r'a\.parquet: row 2: key "golden_answers" must be at least one answer'
    ):
        read(tmp_path / "a.parquet")


def test_numbers_of_a_data_frame(tmp_path: Path) -> None:
    table = pa.table({"id": [1.0, 2.0], "q": ["When?", "How long?"], "a": [1990.0, 3.5], "n": [None, 1]})
    pq.write_table(table, tmp_path / "q.parquet")
    found = read(tmp_path / "q.parquet")
    assert [(q.id, q.golden_answers) for q in found] == [("1", ("1990",)), ("2", ("3.5",))]


@pytest.mark.parametrize(
    "change",
    [
        {},
        AS_OBJECTS,
        {"supporting_facts": json.dumps(HOTPOT["supporting_facts"]), "context": json.dumps(PARAGRAPHS)},
        {"context": None, "supporting_facts": None, "metadata": {"level": "hard", **AS_OBJECTS}},
        {"golden_passages": [each | {"score": 1} for each in GOLD]},
        {"golden_passages": json.dumps(GOLD)},
        {"metadata": {"golden_passages": GOLD}},
    ],
)  # fmt: skip
def test_gold_passages_of_hotpotqa_and_its_relatives(tmp_path: Path, change: dict[str, Any]) -> None:
    row = {key: value for key, value in {**HOTPOT, **change}.items() if value is not None}
    if "metadata" in change:
        row.pop("context", None), row.pop("supporting_facts", None)
    path = write(tmp_path / "hotpot_dev.json", json.dumps([row]))
    assert read(path) == [Question("5a7", "Who wrote?", ("Ada",), {"golden_passages": GOLD})]


def test_gold_passages_of_musique_and_ids_of_passages(tmp_path: Path) -> None:
    paragraphs = [
        {"idx": n, "title": t, "paragraph_text": t * 2, "is_supporting": t != "B"}
        for n, t in enumerate("ABC")
    ]
    rows = [
        {"id": "2hop", "question": "Who?", "answer": "x", "answer_aliases": ["y"], "paragraphs": paragraphs},
        {
            "id": 3,
            "question": "Who?",
            "answer": "x",
            "golden_passages": [{"id": "p1", "title": "", "text": "t"}],
        },
    ]
    found = read(write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows))))
    assert found[0].golden_answers == ("x", "y")
    assert found[0].metadata == {"golden_passages": [{"title": t, "text": t * 2} for t in "AC"]}
    assert found[1].metadata == {"golden_passages": [{"id": "p1", "title": "", "text": "t"}]}


def test_columns_by_name_by_number_and_within_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "Frage,Antwort,Nr\nWho?,Ada,7\n")
    assert read(path, question="Frage", answers="Antwort", id="Nr") == [Question("7", "Who?", ("Ada",))]
    # DPR's files: no head, a Python list, quoted where it has quotes
    dpr = write(tmp_path / "nq.txt", 'who is it\t[\'Ada\']\n"what is it"\t"[\'it\'\'s\', ""a dog\'s""]"\n')
    with pytest.raises(UserError, match=r"nq\.txt:2: has no question under a usual name"):
        read(dpr)
    dpr = write(tmp_path / "nq.txt", 'who is it\t[\'Ada\']\nwhat is it\t"[""a dog\'s"", \'b\']"\n')
    assert asked(dpr, question=1, answers=2) == [("who is it", ("Ada",)), ("what is it", ("a dog's", "b"))]
    path = write(tmp_path / "q.jsonl", '{"x": {"q": "Who?", "a": {"text": ["Ada"]}}, "question": "no"}')
    assert asked(path, question="x.q", answers="x.a") == [("Who?", ("Ada",))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.jsonl", '{"question": "a", "answer": "x"}\n\n{"question": "b"}', ':3: has no answers under'),
        ("q.jsonl", '{"text": "a", "answer": "x"}', 'its keys are "text", "answer"; data.files.qu'),
        ("q.jsonl", '{"question": "a", "answer": "x", "answers": ["y"]}', 'has "answers" and "answer"'),
        ("q.jsonl", '{"question": "a", "answer": true}', ':1: key "answer" holds true'),
        ("q.jsonl", '{"question": "a", "answer": {"b": 1}}', 'key "answer" must be a string, a n'),
        ("q.jsonl", '{"question": "a", "answer": [["x"]]}', 'of them, but holds [["x"]]'),
        ("q.jsonl", '{"question": "a", "answer": ["", " \u200b"]}', 'at least one answer, but holds ["", "'),
        ("q.jsonl", '{"question": "a", "answer": null}', "at least one answer, but holds null"),
        ("q.jsonl", '{"question": " ", "answer": "x"}', 'must be a question, but holds " "'),
        ("q.jsonl", '{"question": ["a"], "answer": "x"}', 'must be a question, but holds ["a"]'),
        ("q.jsonl", '{"question": "a", "answer": "x", "id": [1]}', 'key "id" must be a string or a wh'),
        ("q.jsonl", '{"question": "a", "answer": "\\ud800"}', ":1: 'utf-8' codec can't encode"),
        ("q.jsonl", '{"question": "a", "answer": "x", "golden_passages": ["p"]}', '"title" and "te'),
        ("q.jsonl", '{"question": "a", "answer": "x", "context": 1, "supporting_facts": 2}', "as HotpotQA"),
        ("q.jsonl", "{\n", ":1: not JSON"),
        ("q.jsonl", "", ": no questions in this file"),
        ("q.json", '[{"question": "a", "answer": "x"},\n7]', ": record 2: must be a JSON object, but is 7"),
        ("q.json", '[{"question": "a",\n]', ":2: not JSON"),
        ("q.json", "[" * 100_000, "nested too deeply"),
        ("q.csv", "question,answer\na,x\n\n\"b\nc\",\"['x' 'y']\"\n", ":4: key \"answer\" holds"),
        ("q.csv", "question,answer\na,\n", ':2: key "answer" must be at least one answer, but holds ""'),
        ("q.csv", "question,answer\na,[x]\n", 'a list neither in JSON nor in Python: write ["...", "..."]'),
        ("q.csv", "question,answer\na,b,c\n", ":2: has 3 cells, but the first line 2"),
        ("q.csv", "question,question\na,b\n", ":1: two columns have the same name"),
        ("q.csv", 'question,answer\na,x\n"b" c,x\n', ":3: "),
        ("q.csv", 'question,answer\n"a,x\nb,x\n', ":2: "),
        ("q.csv", "question\na\n", "has no answers under a usual name"),
        ("q.xlsx", "PK", ".jsonl, .json, .csv, .tsv"),
        ("q.parquet", "PAR1", "not a readable Parquet file"),
        ("q.jsonl.gz", "x", "not readable as gzip"),
    ],
)  # fmt: skip
def test_errors_name_the_place_and_what_is_wanted(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["q.csv", "q.json"])
def test_other_encodings_are_refused_with_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("[\nWho?,Zoë\n".encode("cp1252"))
    with pytest.raises(UserError, match=rf"{name}:2: not in UTF-8, save the file so"):
        read(tmp_path / name)


def test_made_ids_come_of_set_and_content(tmp_path: Path) -> None:
    """They stay when rows move to another file and form; in another set they are others."""
    rows = [{"question": f"Who is {n}?", "answer": f"x{n}"} for n in range(3)]
    lines = write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))
    table = write(
        tmp_path / "q.csv",
        "question,answer\n" + "\n".join(f"{r['question']},{r['answer']}" for r in rows[::-1]),
    )
    ids = [question.id for question in read(lines)]
    assert len(set(ids)) == 3 and [question.id for question in read(table)] == ids[::-1]
    assert not set(ids) & {question.id for question in read_question_files("other", [lines])[0]}
    both, told = read_question_files("mine", [lines, table])
    assert [question.id for question in both] == [*ids, *(f"{own}-2" for own in ids[::-1])]
    assert told == []


def test_ids_that_stand_twice_are_refused_or_renamed_and_said(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "id,question,answer\n1,a,x\n1-2,b,x\n")
    second = write(tmp_path / "b.csv", "id,question,answer\n\n1,c,x\n1,d,x\n")
    with pytest.raises(UserError) as caught:
        read_question_files("mine", [first, second])
    assert str(caught.value) == (
        f"{second}:3: id '1' was used before, at {first}:2; duplicate_ids: rename makes ids unique"
    )
    found, told = read_question_files("mine", [first, second], QuestionForm(rename_ids=True))
    assert [question.id for question in found] == ["1", "1-2", "1-3", "1-4"]
    assert told == ["mine: 2 ids that stood twice have a number now"]


def test_empty_answers_beside_others_are_dropped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", '{"question": "a", "answer": ["", "Ada", " ", null]}')
    found, told = read_question_files("mine", [path])
    assert [question.golden_answers for question in found] == [("Ada",)]
    assert told == ["mine: 2 empty answers beside others are left out"]
