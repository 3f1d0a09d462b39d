"""Files and folders that are whole or absent: they are written beside their place and renamed into it."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dgpo_core.errors import UserError

T = TypeVar("T")
PART = ".part"  # suffix of what is being written
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write a file or folder to; put it there when the body has succeeded.

    What a killed process has left of an earlier attempt is removed first, and what a failed body has written
    afterwards. A link is replaced, and what it leads to stays as it is. Only one process may write a path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    remove(part)
    try:
        yield part
    except BaseException:
        with suppress(OSError):
            remove(part)
        raise
    put(part, path)


def put(source: Path, target: Path) -> None:
    """Move a file or folder to `target`, in place of what is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_dev != target.parent.stat().st_dev:  # data/ may be a link to a larger disk
        with replacement(target) as part:
            shutil.move(source, part)
        return
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        remove(target)  # a folder is not replaced at once
        os.replace(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8; a reader sees the old one or the new one, never a part."""
    with replacement(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def parsed_json(content: str | bytes) -> Any:
    """Return what JSON says. Raises ValueError, also for what nests deeper than Python reads."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as write_text does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read a JSON file as the dataclass `kind`, or a list of such.

    Raises UserError naming file and key, and OSError.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        raise UserError(f"{path}: not {what}: {key}{first['msg'].removeprefix('Value error, ')}") from error
