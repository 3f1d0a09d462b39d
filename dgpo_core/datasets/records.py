"""Passages and questions as the field stores them (JSON lines), read with errors that name the line.

Formats: `PeterJinGo/wiki-18-corpus` ({"id", "contents"} with contents = '"Title"\\ntext') and
`RUC-NLPIR/FlashRAG_datasets` ({"id", "question", "golden_answers", "metadata"}). The field's other names for
the same are read too: "title" and "text", "_id" or "docid", "answer" or "answers" (docs/data.md).
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dgpo_core.errors import UserError
from dgpo_core.text import trimmed

T = TypeVar("T")
_IDS = ("id", "_id", "docid")
_ANSWERS = ("golden_answers", "answer", "answers")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a surrogate pair, as JSON escapes it; most come in pairs


@dataclass(frozen=True)
class Passage:
    """A passage of a corpus; `contents` is the form in which it is stored and encoded."""

    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Passage":
        """Read {"id", "contents"} or {"id", "title", "text"}. Raise ValueError naming the key at fault."""
        if "contents" not in row and "text" in row:
            if not isinstance(row.get("title"), str):
                raise ValueError(f'beside "text" a string "title" is wanted; {_keys(row)}')
            title = " ".join(_string(row, "title", empty=True).split())
            return cls(_id(row), title, _lines(_string(row, "text")))
        if not isinstance(row.get("contents"), str):
            raise ValueError(
                f'key "contents" must be a non-empty string (or give "title" and "text"); {_keys(row)}'
            )
        title, separator, text = _lines(_string(row, "contents")).partition("\n")
        if not separator:
            raise ValueError('key "contents" must be \'"Title"\\ntext\', but has no line break')
        return cls(_id(row), unquoted(title), text)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "contents": self.contents}


@dataclass(frozen=True)
class Question:
    """A question; `metadata` may hold "golden_passages" [{"id", "title", "text"}] and "long_answers" [str].

    Passages of another corpus than the searched one (the published gold contexts) have no "id".
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Question":
        """Read a question under any of the names above. Raise ValueError naming the key at fault."""
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise ValueError('key "metadata" must be an object')
        return cls(_id(row), _string(row, "question"), _answers(row), metadata)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "question": self.question,
            "golden_answers": list(self.golden_answers),
            "metadata": self.metadata,
        }


def read_corpus(path: Path) -> Iterator[Passage]:
    """Read a corpus file (.jsonl or .jsonl.gz) passage by passage, in constant memory where ids count up.

    Raise UserError with file and line; ids must be unique.
    """
    ids = UniqueIds()
    for line, passage in read_lines(path, lambda row, _: Passage.from_json(row)):
        if not ids.add(passage.id):
            raise UserError(f"{path}:{line}: id {passage.id!r} was used on an earlier line")
        yield passage


def read_questions(
    path: Path, parse: Callable[[dict[str, Any]], Question] = Question.from_json
) -> list[Question]:
    """Read all questions of a file; one without an id (as NQ-open's) has the number of its line for one.

    Raise UserError with file and line; ids must be unique.
    """
    questions: list[Question] = []
    seen: dict[str, int] = {}
    for line, question in read_lines(path, lambda row, number: parse(_with_id(row, number))):
        if question.id in seen:
            raise UserError(f"{path}:{line}: id {question.id!r} was used on line {seen[question.id]} before")
        seen[question.id] = line
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no questions in this file")
    return questions


class UniqueIds:
    """Finds ids that return. Those that count up from the first one, as wiki-18's, take no memory."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._next = 0
        self._others: set[str] = set()

    def add(self, name: str) -> bool:
        """Add an id and return whether it is new."""
        number = _number(name)
        if self._first is None:
            self._first = self._next = -1 if number is None else number
        if number is not None and number == self._next:
            self._next += 1
            return name not in self._others
        if name in self._others or (number is not None and self._first <= number < self._next):
            return False
        self._others.add(name)
        return True


def _number(name: str) -> int | None:
    """Return the number of at most 18 digits that `name` is the usual way to write of, if it is one."""
    plain = len(name) <= 18 and name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
    return int(name) if plain else None


def write_jsonl(path: Path, records: Iterable[Passage | Question]) -> None:
    """Write passages or questions, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    """Yield what `parse` makes of each line's object, as `read_lines` does."""
    return (record for _, record in read_lines(path, lambda row, _: parse(row)))


def read_lines(path: Path, parse: Callable[[dict[str, Any], int], T]) -> Iterator[tuple[int, T]]:
    """Yield (line number, what `parse` makes of its object and number), line by line.

    A path that ends in .gz is unpacked. Lines of white space alone are no records, and a byte order mark at
    the start is no part of the first. Raise UserError with file and line for what is not JSON in UTF-8, for
    text that no file can hold, and for a ValueError of `parse`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(path, number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
                if text.strip():
                    yield number, _parsed(path, number, text, parse)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: not readable as gzip from here on: {error}") from error


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not in UTF-8, save the file so: {error}") from error


def _parsed(path: Path, number: int, text: str, parse: Callable[[dict[str, Any], int], T]) -> T:
    try:
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("a line must be a JSON object")
        if _HALF.search(text):
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # also metadata, and what is read past us
        return parse(row, number)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # Unicode errors are ValueErrors too
        raise UserError(f"{path}:{number}: {error}") from error
    except RecursionError:
        raise UserError(f"{path}:{number}: nested too deeply") from None


def unquoted(title: str) -> str:
    """Return a title without its quotes, and without white space and invisible characters around them."""
    bare = trimmed(title)
    return bare[1:-1] if len(bare) >= 2 and bare[0] == bare[-1] == '"' else bare


def _lines(text: str) -> str:
    """Return `text` with Windows' line ends as all others."""
    return text.replace("\r\n", "\n")


def _string(row: dict[str, Any], key: str, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not (empty or trimmed(value)):
        raise ValueError(f'key "{key}" must be a non-empty string; {_keys(row)}')
    value.encode("utf-8")  # JSON can escape what UTF-8 cannot write: half of a surrogate pair
    return value


def _id(row: dict[str, Any]) -> str:
    key = next((key for key in _IDS if key in row), None)
    if key is None:
        raise ValueError(f'key "id" is missing; {_keys(row)}')
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f'key "{key}" must be a non-empty string or an integer')
    return str(value)


def _with_id(row: dict[str, Any], number: int) -> dict[str, Any]:
    return row if any(key in row for key in _IDS) else {"id": number, **row}


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """Return golden answers of any of the forms; those of "answer" with MuSiQue's "answer_aliases"."""
    given = [key for key in _ANSWERS if key in row]
    if not given:
        raise ValueError(f'key "golden_answers" is missing; {_keys(row)}')
    key = given[0]
    if given == ["answer", "answers"]:
        raise ValueError('has both "answer" and "answers": write "golden_answers"')
    listed = _as_list(row[key]) + (_as_list(row.get("answer_aliases", [])) if key == "answer" else [])
    for answer in listed:
        if isinstance(answer, bool) or not isinstance(answer, str | int):
            raise ValueError(f'key "{key}" must be a list of strings, but holds {_shown(answer)}')
    answers = tuple(map(str, listed))
    if not any(trimmed(answer) for answer in answers):
        raise ValueError(f'key "{key}" must be a list of at least one string that is not empty')
    "".join(answers).encode("utf-8")  # see _string
    return answers


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str) and value[:1] == "[" and value[-1:] == "]":
        raise ValueError(f"{_shown(value)} is a list written as a string: leave out the quotes around it")
    return value if isinstance(value, list) else [value]


def _keys(row: dict[str, Any]) -> str:
    """Return the keys that are there instead, for an error."""
    return f"its keys are {', '.join(json.dumps(key) for key in list(row)[:10]) or 'none'}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return f"{text[:40]}: write {json.dumps(text)}" if isinstance(value, float) else text[:40]
