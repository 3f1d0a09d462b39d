"""A cassette: what an index has found, recorded in a file and replayed exactly.

`retrieval.location: record:FILE+LOCATION` searches at LOCATION and records; `replay:FILE` needs no index but
its manifest. A file has JSON lines: first the digest of the index, then a line for each query.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from dgpo_core.retrieval.ranking import Hit

Key = tuple[str, int]  # query, top_k


class Source(Protocol):
    """What an index searches with."""

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return the best passages of each query, best first."""
        ...

    def close(self) -> None: ...


class Cassette:
    """Answers from the file at `path`, and records there what only `source` knows, if there is one.

    What is recorded once is never asked again, so that a run that was killed and continued sees one index.
    Several processes may record into one file. Raise UserError for a file of another index than `digest`.
    """

    def __init__(self, path: Path, digest: str, source: Source | None = None) -> None:
        self._path, self._digest, self.source = path, digest, source
        self._lock = FileLock(f"{path}.lock")
        if source is None:
            self._recorded = self._read()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            _mend(path)
            if not path.stat().st_size:
                _append(path, [{"index": digest}])
            self._recorded = self._read()

    def hits(self, queries: list[str], top_k: int) -> list[list[Hit]]:
        """Return what was recorded; record the rest. Raise UserError for a query that is not recorded."""
        new = [query for query in dict.fromkeys(queries) if (query, top_k) not in self._recorded]
        if new and self.source is None:
            raise UserError(
                f"retrieval.location: {self._path} has no record of {len(new)} of {len(queries)} queries "
                f"with top_k {top_k}, as of {new[0][:100]!r}: the run that was recorded has not asked it; "
                f"record again (record:{self._path}+<location>)"
            )
        if new and self.source is not None:
            found = dict(zip(new, self.source.hits(new, top_k), strict=True))
            with self._lock:
                _append(self._path, (_line(query, top_k, hits) for query, hits in found.items()))
            self._recorded |= {(query, top_k): hits for query, hits in found.items()}
        return [self._recorded[query, top_k] for query in queries]

    def close(self) -> None:
        if self.source is not None:
            self.source.close()

    def _read(self) -> dict[Key, list[Hit]]:
        """Read the file. Of a query that several processes have recorded the first line counts."""
        if not self._path.is_file():
            raise UserError(f"retrieval.location: {self._path}: no such file; record it first")
        lines = self._path.read_bytes().splitlines()
        recorded: dict[Key, list[Hit]] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = parsed_json(line)
                if number > 1:
                    recorded.setdefault((row["query"], row["top_k"]), [_hit(*each) for each in row["hits"]])
                    continue
                index = row["index"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path}:{number}: no line of a cassette: {error}") from error
            if index != self._digest:
                raise UserError(
                    f"retrieval.location: {self._path} was recorded of the index {index!r}, not of "
                    f"{self._digest!r}, which data/index names"
                )
        if not lines:
            raise UserError(f"retrieval.location: {self._path} is empty; record it again")
        return recorded


def _mend(path: Path) -> None:
    """Make the file, or cut off the line that a killed process has not finished."""
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def _line(query: str, top_k: int, hits: list[Hit]) -> dict[str, Any]:
    fields = [[hit.passage.id, hit.passage.title, hit.passage.text, hit.score] for hit in hits]
    return {"query": query, "top_k": top_k, "hits": fields}


def _hit(name: str, title: str, text: str, score: float) -> Hit:
    if not all(isinstance(part, str) for part in (name, title, text)) or not isinstance(score, float):
        raise TypeError("a passage has id, title and text, and a score")
    return Hit(Passage(name, title, text), score)
