"""Your own documents as passages of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dgpo_core.datasets.records import Passage, read_corpus
from dgpo_core.errors import UserError

SETTING = "data.files.corpus"


@dataclass
class Reading:
    """What documents hold: passages, and of each file that could not be read the reason."""

    passages: list[Passage] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)


def find_documents(places: Sequence[str], setting: str = SETTING) -> list[Path]:
    """Return the files that files, folders and globs name, each once, in the order of their names.

    Hidden files and folders are left out. Raise UserError for a place where nothing is.
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
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def read_documents(files: Sequence[Path], passage_words: int) -> Reading:
    """Read passages out of `files`, in their order; ids count up. Raise UserError when nothing is read."""
    reading = Reading()
    for file in files:
        if file.suffix not in (".jsonl", ".gz"):
            reading.unread[str(file)] = "a kind of file that is not read"
            continue
        try:
            reading.passages += read_corpus(file)
        except UserError as error:
            reading.unread[str(file)] = str(error)
    if not reading.passages:
        raise UserError(f"{SETTING}: nothing could be read: {reading.unread}")
    reading.passages = [replace(p, id=str(number)) for number, p in enumerate(reading.passages)]
    return reading
