"""Passages and questions as the field stores them (JSON lines), read with errors that name the line.

Formats: `PeterJinGo/wiki-18-corpus` ({"id", "contents"} with contents = '"Title"\\ntext') and
`RUC-NLPIR/FlashRAG_datasets` ({"id", "question", "golden_answers", "metadata"}).
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dgpo_core.errors import UserError

Record = TypeVar("Record")


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str

    @property
    def contents(self) -> str:
        return f'"{self.title}"\n{self.text}'

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Passage":
        title, separator, text = _string(row, "contents").partition("\n")
        if not separator:
            raise ValueError('key "contents" must be \'"Title"\\ntext\', but has no line break')
        if len(title) >= 2 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return cls(_id(row), title, text)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "contents": self.contents}


@dataclass(frozen=True)
class Question:
    """`metadata` may hold "golden_passages" [{"id", "title", "text"}] and "long_answers" [str].

    Passages of another corpus than the searched one (the published gold contexts) have no "id".
    """

    id: str
    question: str
    golden_answers: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Question":
        answers = row.get("golden_answers")
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError('key "golden_answers" must be a list of at least one string')
        "".join(answers).encode("utf-8")  # see _string
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise ValueError('key "metadata" must be an object')
        return cls(_id(row), _string(row, "question"), tuple(answers), metadata)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "question": self.question,
            "golden_answers": list(self.golden_answers),
            "metadata": self.metadata,
        }


def read_corpus(path: Path) -> Iterator[Passage]:
    """Passages of a corpus file (.jsonl or .jsonl.gz), one at a time, in constant memory where ids count up.

    Raises UserError with file and line; ids must be unique.
    """
    ids = UniqueIds()
    for line, passage in enumerate(read_jsonl(path, Passage.from_json), 1):
        if not ids.add(passage.id):
            raise UserError(f"{path}:{line}: id {passage.id!r} was used on an earlier line")
        yield passage


def read_questions(
    path: Path, parse: Callable[[dict[str, Any]], Question] = Question.from_json
) -> list[Question]:
    """All questions of a file. Raises UserError with file and line; ids must be unique."""
    questions = list(read_jsonl(path, parse))
    if not questions:
        raise UserError(f"{path}: no questions in this file")
    seen: dict[str, int] = {}
    for line, question in enumerate(questions, 1):
        if question.id in seen:
            raise UserError(f"{path}:{line}: id {question.id!r} was used on line {seen[question.id]} before")
        seen[question.id] = line
    return questions


class UniqueIds:
    """Finds ids that return. Those that count up from the first one, as wiki-18's, take no memory."""

    def __init__(self) -> None:
        self._first: int | None = None
        self._next = 0
        self._others: set[str] = set()

    def add(self, name: str) -> bool:
        """Whether `name` is new."""
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
    """What `name` is the usual way to write of, if it is a number of at most 18 digits."""
    plain = len(name) <= 18 and name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")
    return int(name) if plain else None


def write_jsonl(path: Path, records: Iterable[Passage | Question]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], Record]) -> Iterator[Record]:
    """What `parse` makes of each line's object, one at a time; a path that ends in .gz is unpacked.

    Raises UserError with file and line for what is not JSON, and for a ValueError of `parse`.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _parsed(path, number, line, parse)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: not readable as gzip from here on: {error}") from error


def _parsed(path: Path, number: int, line: bytes, parse: Callable[[dict[str, Any]], Record]) -> Record:
    try:
        row = json.loads(line.decode("utf-8"))
        if not isinstance(row, dict):
            raise ValueError("a line must be a JSON object")
        return parse(row)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON: {error.msg} at character {error.pos}") from error
    except ValueError as error:  # Unicode errors are ValueErrors too
        raise UserError(f"{path}:{number}: {error}") from error
    except RecursionError:
        raise UserError(f"{path}:{number}: nested too deeply") from None


def _string(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'key "{key}" must be a non-empty string')
    value.encode("utf-8")  # JSON can escape what UTF-8 cannot write: half of a surrogate pair
    return value


def _id(row: dict[str, Any]) -> str:
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError('key "id" must be a non-empty string or an integer')
    return str(value)
