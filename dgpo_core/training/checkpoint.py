"""What a training loop keeps: a checkpoint on disk and the best model; and its stop at what is no number.

A run that is killed at any moment is continued exactly. A quantity that is nan or infinite changes no
weights, and no model is saved.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from dgpo_core.errors import NotFinite, UserError, first_line
from dgpo_core.files import replacement
from dgpo_core.training.parallel import leads

Weights = dict[str, Tensor]  # parameter -> value, on the CPU


def require_finite(quantities: Mapping[str, float]) -> None:
    """Raise NotFinite for the first quantity that is nan or infinite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            raise NotFinite(name, value)


@contextmanager
def training_step(step: int, lower: Callable[[str], str]) -> Iterator[None]:
    """Add the step, and the setting to lower from `lower(quantity)`, to a NotFinite that is raised inside."""
    try:
        yield
    except NotFinite as error:
        cure = f"lower {lower(error.quantity)}"
        if step == 1:  # it may have come before any update
            cure += f"; if that does not help, {error.cure}"
        raise NotFinite(error.quantity, error.value, cure, step) from error


def trainable(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters that training changes, with their names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def put_weights(module: torch.nn.Module, weights: Weights) -> None:
    """Copy values into the parameters of these names, all that are trainable."""
    for name, parameter in trainable(module):
        parameter.data.copy_(weights[name])


class BestModel:
    """Keeps the weights of the best validation, the first of equal ones, where there is a `patience`.

    Training is `over` when so many validations in a row brought no higher EM. With `keeps` they are kept
    without a patience too.
    """

    def __init__(self, patience: int | None, keeps: bool = False) -> None:
        self._patience, self._keeps = patience, keeps or patience is not None
        self._em, self._behind = -math.inf, 0
        self.weights: Weights | None = None

    @property
    def over(self) -> bool:
        return self._patience is not None and self._behind >= self._patience

    def chosen(self, rolled_back: bool) -> Weights | None:
        """Return the weights to end with; None: those of the last step."""
        return self.weights if rolled_back or self._patience is not None else None

    def validated(self, em: float, weights: Callable[[], Weights]) -> None:
        """Compare a validation with the best so far; `weights` returns copies of the model's."""
        if not self._keeps:
            return
        self._behind += 1
        if em > self._em:
            self._em, self._behind, self.weights = em, 0, weights()

    def state_dict(self) -> dict[str, Any]:
        return {"em": self._em, "behind": self._behind, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._em, self._behind, self.weights = state["em"], state["behind"], state["weights"]


class Checkpoint:
    """Keeps the newest state in one file, replaced by atomic rename.

    Several processes that train together read the same file; the first one writes it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "checkpoint.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Replace the state on disk by this one."""
        if not leads():
            return
        with replacement(self.path) as part, part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave the new name with no content

    def load(self) -> dict[str, Any] | None:
        """Return the newest state, or None when there is none.

        Raise UserError for a file that is damaged, or that code of another version has written.
        """
        if not self.path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=False, mmap=True)
        except (RuntimeError, EOFError, UnpicklingError, ImportError, AttributeError) as error:
            raise UserError(
                f"{self.path}: not readable: damaged, or of another version of this code "
                f"({first_line(error)}); delete it, and the stage begins again"
            ) from error
        return state
