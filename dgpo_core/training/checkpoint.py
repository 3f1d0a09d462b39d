"""Progress of a training loop on disk: killed at any moment, the next run continues exactly."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dgpo_core.errors import UserError, first_line
from dgpo_core.training.parallel import leads


class Checkpoint:
    """One file that holds the newest state, replaced by atomic rename.

    Several processes that train together read the same file; the first one writes it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "checkpoint.pt"

    def save(self, state: dict[str, Any]) -> None:
        if not leads():
            return
        temporary = self.path.with_suffix(".part")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave the new name with no content
        os.replace(temporary, self.path)

    def load(self) -> dict[str, Any] | None:
        """The newest state, or None when there is none. Raises UserError for a file that is damaged."""
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=False, mmap=True)
        except (RuntimeError, EOFError, UnpicklingError) as error:
            raise UserError(
                f"{self.path}: not readable ({first_line(error)}); delete it, and the stage begins again"
            ) from error
        return state
