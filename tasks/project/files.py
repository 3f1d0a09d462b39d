"""Files of a stage: content hashes, writing by rename, outputs that appear when the stage has succeeded."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
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


def write_text(path: Path, text: str) -> None:
    """Write by atomic rename: a reader sees the old file or the new one, never a part.

    A link is replaced, and what it leads to stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as write_text does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Outputs:
    """What a stage writes: first to places in `folder`, and to where it belongs when all of it is complete.

    So a stage that fails leaves an earlier result as it was, nobody reads a part, and nothing is written
    through a link: outputs may be links into DVC's cache, whose files are named by their content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[Path, Path] = {}  # output -> where it is written

    def place(self, path: Path) -> Path:
        """Where to write the output `path`; the folder above is there."""
        if path not in self._places:
            place = self._folder / str(len(self._places)) / path.name
            place.parent.mkdir(parents=True)
            self._places[path] = place
        return self._places[path]

    @property
    def latest(self) -> Path | None:
        """The output that was asked for last: most likely the one that is being written."""
        return next(reversed(self._places), None)

    def has(self, path: Path) -> bool:
        """Whether the output has been written."""
        return path in self._places and self._places[path].exists()

    def publish(self) -> None:
        """Put every output that was written where it belongs, in place of what is there."""
        for path, place in self._places.items():
            if place.exists():
                _put(place, path)

    def discard(self) -> None:
        """Remove what was written."""
        remove(self._folder)


def _put(source: Path, target: Path) -> None:
    """Move a file or folder to `target`, in place of what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_dev != target.parent.stat().st_dev:  # data/ may be a link to a larger disk
        near = target.with_name(target.name + ".part")
        remove(near)
        shutil.move(source, near)
        source = near
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise
        remove(target)  # a folder is not replaced at once
        os.replace(source, target)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
