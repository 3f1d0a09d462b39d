"""Files of a stage: content hashes, half-written outputs, atomic JSON."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents. Raises UserError if it is missing."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: this input does not exist; run the stage that makes it (`dvc repro`)")
    digest = hashlib.sha256()
    for file_path in sorted(_files(path), key=lambda file: file.relative_to(path).as_posix()):
        digest.update(f"{file_path.relative_to(path).as_posix()}\0{content_hash(file_path)}\n".encode())
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write by atomic rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Outputs:
    """The outputs of a stage, which exist complete or not at all (unless the stage is killed outright).

    Parts that a killed run left are removed at once. What was there before and is untouched when the stage
    fails is somebody's good result and stays.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._remove_parts()
        self._before = [_newest_change(path) for path in self.paths]

    def remove_half_written(self) -> None:
        self._remove_parts()
        for path, before in zip(self.paths, self._before, strict=True):
            if _newest_change(path) != before:
                remove(path)

    def _remove_parts(self) -> None:
        for path in self.paths:
            remove(
                path.with_name(path.name + ".part")
            )  # the writers' convention: file.json.part, folder.part
            remove(path.with_suffix(".part"))


def _newest_change(path: Path) -> tuple[int, int] | None:
    """(newest modification in ns, number of entries) of a file or folder; None when there is none."""
    if not path.exists():
        return None
    times = [path.stat().st_mtime_ns]
    with contextlib.suppress(FileNotFoundError):  # something else removes files at the same time
        times += [entry.stat().st_mtime_ns for entry in path.rglob("*")]
    return max(times), len(times)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
