"""Your own documents as passages: files are found, read, and cut at headings, pages and sentences.

A passage's title is that of its document and the headings above it; its id is the file's path and the
passage's place in it (`handbook.pdf#page=3&passage=2`), so that answers can name their source. Rows of tables
and of JSON lines are passages already, and keep their ids.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dgpo_core.datasets.extraction import KINDS, Document, Unreadable, extract, extraction_key, library
from dgpo_core.datasets.question_files import read_rows
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json, write_json
from dgpo_core.text import trimmed

SETTING = "data.files.corpus"
TABLES = {".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet"}
IDS, TEXTS = ("id", "_id", "docid"), ("contents", "text", "passage", "content")  # the first that a row has
ROW_WORDS = 2  # a row of more times passage_words than this is cut as a document is
LONG_WORD = 15  # characters of a text count as a word at least, be it without spaces
BLOCK = 500  # times a passage's words: characters that are cut at a time, as time grows with their square
SHOWN = 5  # places where nothing could be read, for each reason
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass
class Reading:
    """What documents hold: passages, files by kind, and of each place that could not be read the reason."""

    passages: list[Passage] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)
    renamed: int = 0  # passages whose own id another file has too

    @property
    def counts(self) -> dict[str, int]:
        """Return the counts for a summary."""
        return {
            "passages": len(self.passages),
            "words": sum(count_words(passage.text) for passage in self.passages),
            "repeated_passages": len(self.passages) - len({passage.contents for passage in self.passages}),
            "renamed_ids": self.renamed,
            **{f"files_{kind.lower()}": count for kind, count in sorted(self.kinds.items())},
            "unread": len(self.unread),
        }

    @property
    def remarks(self) -> list[str]:
        """Return what could not be read, a line for each reason, with the first places."""
        places: dict[str, list[str]] = {}
        for place, why in self.unread.items():
            places.setdefault(why, []).append(place)
        return [
            f"not read: {', '.join(found[:SHOWN])}"
            + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            + f": {why}"
            for why, found in places.items()
        ]


def find_documents(places: Sequence[str], setting: str = SETTING) -> list[Path]:
    """Return the files that files, folders and globs name, each once, in the order of their names.

    Hidden files and folders, and Word's own of an open document, are left out. Raise UserError for a place
    where nothing is.
    """
    found: set[Path] = set()
    for place in places:
        path = Path(place)
        if path.is_dir():
            files = {file for file in path.rglob("*") if file.is_file() and not _hidden(file, path)}
        elif path.is_file():
            files = {path}
        else:
            pattern = path.relative_to(path.anchor).as_posix()
            files = {file for file in Path(path.anchor).glob(pattern) if file.is_file()}
        if not files:
            raise UserError(f"{setting}: {place}: no such file, nor a folder or pattern with files")
        found |= files
    return sorted(found)


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "~$")) for part in file.relative_to(folder).parts)


def read_documents(
    files: Sequence[Path],
    passage_words: int,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reading:
    """Read passages of at most `passage_words` words out of `files`, in their order.

    `cache` is a folder of what was extracted before, by content: it may be deleted at any time. Raise
    UserError where not a single passage is found, or a library is missing.
    """
    reading = Reading()
    ids: set[str] = set()
    cutter = Cutter(passage_words)
    for number, path in enumerate(files, 1):
        try:
            passages = list(
                _rows(path, cutter, reading) if _table(path) else _document(path, cutter, reading, cache)
            )
        except Unreadable as why:
            reading.unread[path.as_posix()] = str(why)
        else:
            reading.kinds[_kind(path)] += 1
            for passage in passages:
                if passage.id in ids:
                    passage = replace(passage, id=f"{path.as_posix()}#id={passage.id}")
                    reading.renamed += 1
                ids.add(passage.id)
                reading.passages.append(passage)
        progress(number, len(files))
    if not reading.passages:
        raise UserError(f"{SETTING}: nothing could be read; {'; '.join(reading.remarks)}")
    return reading


def _table(path: Path) -> str | None:
    """Return the kind of a file of rows; None for another file."""
    packed = path.suffix == ".gz"
    return TABLES.get((Path(path.stem) if packed else path).suffix.lower())


def _kind(path: Path) -> str:
    return _table(path) or KINDS[path.suffix.lower()][0]


def _document(path: Path, cutter: "Cutter", reading: Reading, cache: Path | None) -> Iterator[Passage]:
    if path.suffix.lower() not in KINDS:
        raise Unreadable(f"a kind that is not read, as {', '.join([*KINDS, *TABLES])} are")
    document = _extracted(path, cache)
    if document.gaps:
        reading.unread[path.as_posix()] = "; ".join(document.gaps)
    title, number = document.title or path.stem, 0
    for section in document.sections:
        page = [f"page={section.page}"] if section.page else []
        name = " > ".join((title, *section.headings)) + (f", page {section.page}" if section.page else "")
        for text in cutter.cut(section.text):
            number += 1
            place = "&".join([*page, f"passage={number}"])
            yield Passage(f"{path.as_posix()}#{place}", name, text)


def _extracted(path: Path, cache: Path | None) -> Document:
    """Extract a document, or take it from the cache. Raise Unreadable."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    if cache is None:
        return extract(path, content)
    kept = cache / f"{extraction_key(path, content)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent, or not what we wrote
        return Document.from_json(parsed_json(kept.read_bytes()))
    document = extract(path, content)
    write_json(kept, document.to_json())
    return document


def _rows(path: Path, cutter: "Cutter", reading: Reading) -> Iterator[Passage]:
    ids: dict[str, str] = {}
    try:
        for number, (place, row) in enumerate(read_rows(path), 1):
            try:
                passage = _passage(row, f"{path.as_posix()}#row={number}", path.stem)
            except ValueError as error:
                reading.unread[place] = str(error)
                continue
            if passage.id in ids:
                raise Unreadable(f"{place}: id {passage.id!r} was used before, at {ids[passage.id]}")
            ids[passage.id] = place
            parts = cutter.cut(passage.text) if cutter.too_long(passage.text) else [passage.text]
            yield replace(passage, text=parts[0])
            for part, text in enumerate(parts[1:], 2):
                yield replace(passage, id=f"{passage.id}#passage={part}", text=text)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error
    except UserError as error:
        raise Unreadable(str(error).removeprefix(f"{path}: ")) from error


def _passage(row: dict[str, Any], place: str, stem: str) -> Passage:
    """Read a passage under the usual names, whatever their case. Raise ValueError naming what is missing."""
    keys = {str(key).casefold(): value for key, value in row.items() if value not in (None, "")}
    name = next((key for key in TEXTS if isinstance(keys.get(key), str) and trimmed(keys[key])), None)
    if name is None:
        raise ValueError(
            f"no text under {', '.join(TEXTS)}; its keys are {', '.join(map(str, row)) or 'none'}"
        )
    own = next((str(keys[key]) for key in IDS if key in keys), place)
    if name == "contents" and "title" not in keys and "\n" in keys[name].strip():
        return Passage.from_json({"id": own, "contents": keys[name]})
    return Passage.from_json({"id": own, "title": str(keys.get("title", stem)), "text": keys[name]})


def count_words(text: str) -> int:
    """Count words; two characters are one where no spaces divide them, and so are 15 of any other kind."""
    unspaced = 0 if text.isascii() else len(_UNSPACED.findall(text))
    return max(len(text.split()), len(text) // LONG_WORD, (unspaced + 1) // 2)


class Cutter:
    """Cuts a text at paragraphs, lines, sentences and words, the first of these that fits `words`."""

    def __init__(self, words: int) -> None:
        self._words = words
        self._splitters: tuple[Any, Any] | None = None

    def too_long(self, text: str) -> bool:
        """Return whether a passage is so long that it is cut after all."""
        return count_words(text) > ROW_WORDS * self._words

    def cut(self, text: str) -> list[str]:
        """Return the parts of `text` in order, without the white space between them."""
        if count_words(text) <= self._words:
            return [trimmed(text)]
        if self._splitters is None:  # where nothing is cut, the library is not needed
            splitter = library("semantic_text_splitter").TextSplitter
            self._splitters = (
                splitter(BLOCK * self._words),
                splitter.from_callback(count_words, self._words),
            )
        blocks, passages = self._splitters
        return [part for block in blocks.chunks(text) for part in passages.chunks(block)]
