"""Questions in the forms in which people and projects keep them, read with errors that name file and place.

JSON lines, JSON lists, CSV, TSV and Parquet; what question, answers and id are called is known for the usual
names and can be told. Gold passages are read where a file has them: as this project writes them, as HotpotQA
and 2Wiki (`context`, `supporting_facts`) and as MuSiQue (`paragraphs`).
"""

import ast
import codecs
import csv
import gzip
import hashlib
import io
import json
import math
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.datasets.published import musique_gold
from dgpo_core.datasets.records import Question, read_lines
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from dgpo_core.text import trimmed

Row = dict[str, Any]
FORMS = ".jsonl, .json, .csv, .tsv, .txt (as .tsv) or .parquet; .gz behind it where it is text"
USUAL = {  # the first that a row has, whatever its case
    "id": ("id", "_id", "qid", "question_id"),
    "question": ("question", "query", "question_text", "q"),
    "answers": ("golden_answers", "answers", "answer", "golden_answer", "possible_answers", "a"),
}
VERL_ANSWERS = "reward_model.ground_truth.target"
OBJECT_KEYS = (("text",), ("value", "aliases"))  # of an answer that is an object: SQuAD's, TriviaQA's
ID_LENGTH = 12  # hexadecimal digits of an id that is made


@dataclass(frozen=True)
class QuestionForm:
    """What a file's reader must be told: columns that have no usual name, and what to do with ids."""

    columns: Mapping[Any, str | int] = field(default_factory=dict)  # id, question, answers -> name or number
    rename_ids: bool = False  # of ids that stand twice; otherwise they are refused

    @property
    def headless(self) -> bool:
        """Tell whether columns are numbers: then a table has no head."""
        return any(isinstance(column, int) for column in self.columns.values())


def read_question_files(
    name: str, paths: Iterable[Path], form: QuestionForm = QuestionForm()
) -> tuple[list[Question], list[str]]:
    """Read the questions of a set's files, in their order; return them, and what a person should know.

    A question without an id gets one of set and content, so that it keeps it wherever it stands. Raise
    UserError with file, line (in Parquet row, in a JSON list record), key, what is there and what is wanted.
    """
    questions: list[Question] = []
    places: dict[str, str] = {}
    renamed = dropped = 0
    for path in paths:
        before = len(questions)
        for place, row in read_rows(path, form.headless):
            question, empty = _question(name, place, row, form.columns)
            made = not question.id
            own = question.id or _made_id(name, question)
            if own in places and not (made or form.rename_ids):
                hint = "duplicate_ids: rename makes ids unique"
                raise UserError(f"{place}: id {own!r} was used before, at {places[own]}; {hint}")
            renamed += own in places and not made
            own = _unused(own, places)
            places[own] = place
            questions.append(replace(question, id=own))
            dropped += empty
        if len(questions) == before:
            raise UserError(f"{path}: no questions in this file")
    told = [f"{name}: {renamed:,} ids that stood twice have a number now"] if renamed else []
    told += [f"{name}: {dropped:,} empty answers beside others are left out"] if dropped else []
    return questions, told


def _made_id(name: str, question: Question) -> str:
    content = json.dumps([name, question.question, *question.golden_answers])
    return hashlib.sha256(content.encode()).hexdigest()[:ID_LENGTH]


def _unused(own: str, places: Mapping[str, str]) -> str:
    number, found = 2, own
    while found in places:
        found, number = f"{own}-{number}", number + 1
    return found


# --- rows of every form


def read_rows(path: Path, headless: bool = False) -> Iterator[tuple[str, Row]]:
    """Yield (where it stands, its keys and values) of every record. Raise UserError as the reader does.

    The columns of a table that is `headless` are called "1", "2", ...
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    if kind == ".parquet":
        yield from _parquet(path)
    elif kind in (".csv", ".tsv", ".txt"):
        yield from _table(path, kind, headless)
    elif kind in (".json", ".jsonl"):
        yield from _json(path)
    else:
        raise UserError(f"{path}: no form of questions that can be read: {FORMS}")


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a list, an object with one list of records ({"data": [...]}), or a record a line."""
    start = _start(path)
    if not start.startswith("[") and not (start.startswith("{") and ".json" in path.suffixes):
        yield from ((f"{path}:{line}", row) for line, row in read_lines(path, lambda row, _: row))
        return
    text = _text(path)
    try:
        content = parsed_json(text)
    except json.JSONDecodeError as error:
        if start.startswith("[") or error.msg != "Extra data":
            raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
        yield from ((f"{path}:{line}", row) for line, row in read_lines(path, lambda row, _: row))
        return
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    lists = (
        [value for value in content.values() if isinstance(value, list)] if isinstance(content, dict) else []
    )
    objects = [each for each in lists if each and all(isinstance(item, dict) for item in each)]
    records = objects[0] if len(objects) == 1 and "question" not in content else content
    for number, row in enumerate(records if isinstance(records, list) else [records], 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: record {number}: must be a JSON object, but is {_shown(row)}")
        yield f"{path}: record {number}", row


def _start(path: Path) -> str:
    """Return the first characters that are no white space."""
    try:
        with _opened(path) as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable as gzip: {error}") from error
    return start.decode("utf-8", errors="replace").lstrip()


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path) -> str:
    try:
        with _opened(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable as gzip: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not in UTF-8, save the file so (CSV UTF-8): {error}") from error


def _table(path: Path, kind: str, headless: bool) -> Iterator[tuple[str, Row]]:
    """Read a table. Excel writes semicolons where a comma divides decimals, DPR tabs in files named .csv."""
    text = _text(path)
    first = text.lstrip().partition("\n")[0]
    by_count = max(",;", key=first.count)
    divider = "\t" if kind != ".csv" or "\t" in first else by_count
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=divider, strict=True)
    head: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if not any(map(trimmed, cells)):
                continue
            if head is None:
                head = [str(n) for n in range(1, len(cells) + 1)] if headless else list(map(trimmed, cells))
                if len(set(head)) < len(head):
                    raise UserError(f"{place}: two columns have the same name: {', '.join(head)}")
                if not headless:
                    continue
            if len(cells) != len(head):
                raise UserError(f"{place}: has {len(cells)} cells, but the first line {len(head)}")
            yield place, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{line}: {error}: a quote in a cell is written twice") from error


# --- a question of a row


def _question(name: str, place: str, row: Row, columns: Mapping[str, str | int]) -> tuple[Question, int]:
    """Return a row's question, with an empty id where it has none, and how many empty answers it had."""
    try:
        id_key, key, answer_key = (_column(row, part, name, columns) for part in USUAL)
        if not isinstance(text := _value(row, key), str) or not trimmed(text):
            raise ValueError(f'key "{key}" must be a question, but holds {_shown(text)}')
        given = list(_answers(answer_key, _value(row, answer_key)))
        if answer_key == "answer":
            given += _answers("answer_aliases", row.get("answer_aliases"))
        answers = tuple(filter(None, given))
        if not answers:
            shown = _shown(_value(row, answer_key))
            raise ValueError(f'key "{answer_key}" must be at least one answer, but holds {shown}')
        question = Question(
            _id(id_key, _value(row, id_key)) if id_key else "", trimmed(text), answers, gold_passages(row)
        )
        json.dumps(question.to_json(), ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
    except ValueError as error:  # Unicode errors are ValueErrors too
        raise UserError(f"{place}: {error}") from error
    return question, len(given) - len(answers)


def _column(row: Row, part: str, name: str, columns: Mapping[str, str | int]) -> str:
    """Return the key of question, answers or id; "" where a row has no id."""
    there = f"its keys are {', '.join(map(json.dumps, list(row)[:12])) or 'none'}"
    if part in columns:
        told = str(columns[part])
        if _value(row, told, absent := object()) is absent:
            raise ValueError(f'has no "{told}", which columns.{part} names; {there}')
        return told
    folded = {trimmed(key).lower().replace(" ", "_"): key for key in row}
    found = [folded.get(usual, usual) for usual in USUAL[part] if usual in folded]
    if part == "answers":
        if len(found) > 1 and "golden_answers" not in folded:
            raise ValueError(f"has {' and '.join(map(json.dumps, found))}: {_mapping(name, part)} says which")
        found += [VERL_ANSWERS] if _value(row, VERL_ANSWERS) is not None else []
    if not found and part != "id":
        known = ", ".join(USUAL[part])
        raise ValueError(
            f"has no {part} under a usual name ({known}); {there}; {_mapping(name, part)} says so"
        )
    return found[0] if found else ""


def _mapping(name: str, part: str) -> str:
    return f"data.files.questions.{name}.columns: {{{part}: <column>}}"


def _value(row: Row, key: str, absent: object = None) -> Any:
    """Return what stands under a key; one with dots that is no key itself leads into objects."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return absent
        value = value[part]
    return value


def _id(key: str, value: Any) -> str:
    if value is None or value == "" or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'key "{key}" must be a string or a whole number, but holds {_shown(value)}')
    return trimmed(str(value))


def _answers(key: str, value: Any) -> Iterator[str]:
    """Yield the answers that stand under a key, empty ones as ""; of numbers and of every form of lists."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if isinstance(value, str):
        listed = _listed(key, trimmed(value))
        yield from [trimmed(value)] if listed is None else _answers(key, listed)
    elif isinstance(value, bool):
        raise ValueError(f'key "{key}" holds {_shown(value)}, which is no answer: write "yes" or "no"')
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, float):  # spreadsheets and pandas make 1990 a 1990.0
        yield str(int(value) if value.is_integer() else value)
    elif isinstance(value, list | tuple) and not any(isinstance(each, list | tuple) for each in value):
        for each in value:
            yield from [trimmed(each)] if isinstance(each, str) else _answers(key, each)
    elif isinstance(value, dict) and (keys := [names for names in OBJECT_KEYS if names[0] in value]):
        for own in keys[0]:
            yield from _answers(key, value.get(own))
    else:
        raise ValueError(
            f'key "{key}" must be a string, a number or a list of them, but holds {_shown(value)}'
        )


def _listed(key: str, text: str) -> list[Any] | None:
    """Return the list that a cell holds in JSON or Python's form, also with quotes around it; else None."""
    bare = text[1:-1] if text[:1] == text[-1:] in ('"', "'") else text
    if not (bare[:1] == "[" and bare[-1:] == "]"):
        return None
    for read in (json.loads, _literal):
        try:
            found = read(text)
            found = read(found) if isinstance(found, str) else found
            if isinstance(found, list):
                return found
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            continue
    raise ValueError(
        f'key "{key}" holds {_shown(text)}, a list neither in JSON nor in Python: write ["...", "..."]'
    )


def _literal(text: str) -> Any:
    """Read a Python literal. Raise ValueError for strings without a comma between them, as numpy prints."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    if (tokenize.STRING, tokenize.STRING) in pairwise(kinds):
        raise ValueError("no comma between two strings")
    return ast.literal_eval(text)


# --- gold passages


def gold_passages(row: Row) -> dict[str, Any]:
    """Return the metadata of a row's gold passages, empty where it has none.

    Raise ValueError naming the key at fault.
    """
    metadata = row.get("metadata")
    for source in (row, metadata if isinstance(metadata, dict) else {}):
        if source.get("golden_passages"):
            return {"golden_passages": [_passage(each) for each in _list(source, "golden_passages")]}
        if "supporting_facts" in source and "context" in source:
            found = _supporting(source["supporting_facts"], source["context"])
            return {"golden_passages": found} if found else {}
    return musique_gold(row) if isinstance(row.get("paragraphs"), list) else {}


def _list(source: Row, key: str) -> list[Any]:
    value = source[key]
    if isinstance(value, str):
        value = _listed(key, trimmed(value))
    if not isinstance(value, list):
        raise ValueError(
            f'key "{key}" must be a list of {{"title", "text"}}, but holds {_shown(source[key])}'
        )
    return value


def _passage(value: Any) -> dict[str, str]:
    whole = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("title", "text"))
    if not whole:
        raise ValueError(
            f'key "golden_passages" must hold objects with "title" and "text", not {_shown(value)}'
        )
    return {key: str(value[key]) for key in ("id", "title", "text") if value.get(key) is not None}


def _supporting(facts: Any, context: Any) -> list[dict[str, str]]:
    """Return the paragraphs that supporting facts name, each once, in their order.

    Both are lists of pairs, as HotpotQA writes them, or objects of lists, as on the Hugging Face hub; a
    string holds either as JSON.
    """
    try:
        facts, context = (json.loads(each) if isinstance(each, str) else each for each in (facts, context))
        if isinstance(facts, dict):
            titles, sentences = facts["title"], context.get("sentences", context.get("content"))
            paragraphs = dict(zip(context["title"], sentences, strict=True))
        else:
            titles, paragraphs = [title for title, _ in facts], dict(context)
        return [
            {"title": title, "text": " ".join(sentence.strip() for sentence in paragraphs[title])}
            for title in dict.fromkeys(titles)
            if title in paragraphs
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError('keys "supporting_facts" and "context" are not as HotpotQA writes them') from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
