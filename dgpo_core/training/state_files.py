"""A training's state as a folder that holds no code: tensors as safetensors, all else as JSON, and checksums.

`sha256sum -c SHA256SUMS` in the folder checks it by hand.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dgpo_core.agent.episode import Ending, Episode, Outcome, Search
from dgpo_core.files import parsed_json, write_text

TENSORS, VALUES, CHECKSUMS = "tensors.safetensors", "values.json", "SHA256SUMS"


class Damaged(Exception):
    """A folder that does not hold what was written to it."""


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of numbers, texts, tensors and episodes; tuples become lists.

    Raise TypeError for anything else.
    """
    folder.mkdir(parents=True)
    tensors = _Tensors()
    values = json.dumps(_packed(state, tensors))
    save_file(tensors.by_name, folder / TENSORS)
    write_text(folder / VALUES, values)
    sums = [f"{_sha256(folder / name)}  {name}" for name in (TENSORS, VALUES)]
    write_text(folder / CHECKSUMS, "\n".join(sums) + "\n")
    for path in (*folder.iterdir(), folder):  # else a power failure could leave names with no content
        _flush(path)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, tensors on the CPU. Raise Damaged."""
    try:
        for name, expected in _checksums(folder):
            if _sha256(folder / name) != expected:
                raise Damaged(f"{name} is not what {CHECKSUMS} says")
        tensors = load_file(folder / TENSORS)
        state: dict[str, Any] = _unpacked(parsed_json((folder / VALUES).read_bytes()), tensors)
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from error
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"of another version of this code ({type(error).__name__}: {error})") from error
    return state


class _Tensors:
    """Collects tensors under numbers; those that share memory, which safetensors cannot say, are copied."""

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._memory: set[int] = set()

    def add(self, tensor: torch.Tensor) -> str:
        """Take a tensor and return its name."""
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in self._memory:
            own = own.clone()
        self._memory.add(own.untyped_storage().data_ptr())
        name = str(len(self.by_name))
        self.by_name[name] = own
        return name


def _packed(value: Any, tensors: _Tensors) -> Any:
    """Return what JSON can hold in a value's place; its tensors go into `tensors`."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case torch.Tensor():
            return {"tensor": tensors.add(value)}
        case Episode():
            return {"episode": vars(value) | {"searches": [vars(search) for search in value.searches]}}
        case dict():  # in pairs: keys may be numbers
            return {"dict": [[key, _packed(entry, tensors)] for key, entry in value.items()]}
        case list() | tuple():
            return [_packed(entry, tensors) for entry in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that `_packed` was given."""
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"episode": values}:
            own = {"outcome": Outcome(values["outcome"]), "ending": Ending(values["ending"])}
            searches = [Search(**search) for search in values["searches"]]
            return Episode(**{**values, **own, "searches": searches})
        case {"dict": pairs}:
            return {key: _unpacked(entry, tensors) for key, entry in pairs}
        case list():
            return [_unpacked(entry, tensors) for entry in value]
    return value


def _checksums(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield file names with their checksums. Raise Damaged where they are not those of both files."""
    lines = (folder / CHECKSUMS).read_text("utf-8").splitlines()
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if found.keys() != {TENSORS, VALUES}:
        raise Damaged(f"{CHECKSUMS} is cut off")
    yield from found.items()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
