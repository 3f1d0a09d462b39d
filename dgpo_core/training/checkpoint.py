"""What a training loop keeps: a checkpoint on disk and the best model; and its stop at what is no number.

A run that is killed at any moment is continued exactly. A quantity that is nan or infinite changes no
weights, and no model is saved.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dgpo_core.errors import NotFinite, UserError, first_line
from dgpo_core.files import PART, remove, replacement
from dgpo_core.training.parallel import leads
from dgpo_core.training.state_files import Damaged, read_state, write_state

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


class Updated(Protocol):
    """A part of a training whose weights change only after `updates` has grown (`engines.TrainingEngine`)."""

    updates: int

    @property
    def lockstep(self) -> bool: ...

    def state_dict(self) -> dict[str, Any]: ...


class Checkpoint:
    """Keeps the newest states of a training, each a numbered folder that is whole or absent.

    Several processes that train together read the same folders; the first one writes them.
    """

    def __init__(self, folder: Path, keep_last: int = 2, note: Callable[[str], object] = print) -> None:
        """`note` is told of a state that cannot be used."""
        self.folder, self._keep_last, self._note = folder / "checkpoints", keep_last, note
        if (folder / "checkpoint.pt").exists():
            note(f"{folder / 'checkpoint.pt'}: of an older version, not read; training begins again")

    def save(self, state: dict[str, Any]) -> None:
        """Write a state, and remove those that are older than the newest `keep_last`."""
        if not leads():
            return
        kept = self._kept()
        number = int(kept[-1].name) + 1 if kept else 1
        with replacement(self.folder / f"{number:06}") as part:
            write_state(part, state)
        for old in [*self._kept()[: -self._keep_last], *self.folder.glob(f"*{PART}")]:
            remove(old)

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole, or None when there is none; say which ones are damaged.

        Raise UserError when all are.
        """
        kept = self._kept()
        for folder in reversed(kept):
            try:
                return read_state(folder)
            except Damaged as error:
                self._note(f"{folder}: damaged, not used: {error}")
        if kept:
            raise UserError(f"{self.folder}: no checkpoint is whole; delete it, and the stage begins again")
        return None

    @contextmanager
    def saved_when_stopped(
        self, engines: Mapping[str, Updated], parts: Mapping[str, Any], **others: Any
    ) -> Iterator[None]:
        """Save the state as it is now when a signal stops the body before it has changed a weight.

        The state has `others`, and the `state_dict` of each engine and part. Engines in lockstep are left
        out: they gather their state together, and a signal finds each process elsewhere.
        """
        updates = [engine.updates for engine in engines.values()]
        held = {name: part.state_dict() for name, part in parts.items()}
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            alone = not any(engine.lockstep for engine in engines.values())
            if alone and updates == [engine.updates for engine in engines.values()]:
                own = {name: engine.state_dict() for name, engine in engines.items()}
                try:
                    self.save({**others, **held, **own})
                except Exception as error:  # it is stopped, whatever becomes of this
                    self._note(f"{self.folder}: the last steps were not saved: {first_line(error)}")
            raise

    def _kept(self) -> list[Path]:
        """Return the states on disk, the newest last."""
        return sorted(path for path in self.folder.glob("*") if path.name.isdigit())
