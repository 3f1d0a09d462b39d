"""Files of a stage: content hashes, and outputs that appear when the stage has succeeded."""

import hashlib
from pathlib import Path

from dgpo_core.errors import UserError
from dgpo_core.files import put, remove


def content_hash(path: Path) -> str:
    """Compute the SHA-256 of a file, or of a folder's names and contents. Raise UserError for none."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: this input does not exist; run the stage that makes it (`dvc repro`)")
    digest = hashlib.sha256()
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    for name, file_path in sorted(files.items()):
        digest.update(f"{name}\0{content_hash(file_path)}\n".encode())
    return digest.hexdigest()


class Outputs:
    """What a stage writes: first to places in `folder`, and to where it belongs when all of it is complete.

    So a stage that fails leaves an earlier result as it was, nobody reads a part, and nothing is written
    through a link: outputs may be links into DVC's cache, whose files are named by their content.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[Path, Path] = {}  # output -> where it is written

    def place(self, path: Path) -> Path:
        """Return where to write the output `path`; the folder above is there."""
        if path not in self._places:
            place = self._folder / str(len(self._places)) / path.name
            place.parent.mkdir(parents=True)
            self._places[path] = place
        return self._places[path]

    @property
    def latest(self) -> Path | None:
        """Return the output that was asked for last: most likely the one that is being written."""
        return next(reversed(self._places), None)

    def has(self, path: Path) -> bool:
        """Tell whether the output has been written."""
        return path in self._places and self._places[path].exists()

    def publish(self) -> None:
        """Put every output that was written where it belongs, in place of what is there."""
        for path, place in self._places.items():
            if place.exists():
                put(place, path)

    def discard(self) -> None:
        """Remove what was written."""
        remove(self._folder)
