"""What distillation baselines adapt while they train: TAID's interpolation, DistiLLM's sources of episodes.

Nothing here draws random numbers of its own, and everything has a `state_dict`: a killed training continues
exactly.
"""

import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class Interpolation:
    """TAID's share of the teacher in the target, `t` (Shing et al., 2025; `divergences.taid`).

    It rises at least linearly from `start` to `end` over `total_steps`, and faster while the loss falls:
    `trend` is the moving average of the loss's relative fall, weight `decay` on the past.
    """

    total_steps: int
    start: float = 0.4
    end: float = 1.0
    step_size: float = 5e-4
    decay: float = 0.99

    def __post_init__(self) -> None:
        self.t = self.start
        self.trend = 0.0
        self.previous_loss: float | None = None

    def update(self, loss: float, step: int) -> None:
        """After update number `step` (from 1) with this training loss: the `t` of the next one.

        The first loss has nothing to be compared with and leaves `t` alone, as in the released code.
        """
        if self.previous_loss is not None:
            fall = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.trend = self.decay * self.trend + (1 - self.decay) * fall
            adaptive = self.t + self.step_size * _sigmoid(self.trend) * (1 - self.t)
            linear = self.start + (self.end - self.start) * step / self.total_steps
            self.t = min(self.end, max(linear, adaptive))
        self.previous_loss = loss

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "trend": self.trend, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.trend, self.previous_loss = state["t"], state["trend"], state["previous_loss"]


class Source(StrEnum):
    """Where a batch of episodes comes from."""

    TEACHER = "teacher"  # the fixed teacher episodes
    STUDENT = "student"  # fresh ones of the student, which go into the replay buffer too
    REPLAY = "replay"  # the student's earlier ones


@dataclass
class OffPolicy:
    """DistiLLM's adaptive off-policy scheduler: which share of the batches is the student's, `phi`.

    It grows by `growth`, to at most 1, whenever the validation loss (nats) is `tolerance` or more above the
    one at the last growth, the first being that of the untrained student (Ko et al., 2024, and its code).
    """

    total_steps: int
    growth: float = 0.1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        self.phi = 0.0
        self.reference_loss: float | None = None

    def validate(self, loss: float) -> None:
        """Take note of a validation loss; the first is measured before training."""
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self.tolerance:
            self.phi = min(1.0, self.phi + self.growth)
            self.reference_loss = loss

    def source(self, draw: float, step: int, buffer_full: bool) -> Source:
        """Source of the batch of update `step` (from 1), given a draw that is uniform on [0, 1).

        Of the student's batches the share 1 - step / total_steps is fresh. As in the released code all are,
        until the buffer is full.
        """
        if draw >= self.phi:
            return Source.TEACHER
        if draw < self.phi * (1 - step / self.total_steps) or not buffer_full:
            return Source.STUDENT
        return Source.REPLAY

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "reference_loss": self.reference_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.reference_loss = state["phi"], state["reference_loss"]


class ReplayBuffer(Generic[Item]):
    """The student's newest episodes, at most `capacity`; the oldest make room."""

    def __init__(self, capacity: int = 1000) -> None:
        self._items: deque[Item] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def full(self) -> bool:
        return len(self._items) == self._items.maxlen

    def add(self, items: Iterable[Item]) -> None:
        self._items.extend(items)

    def sample(self, count: int, rng: random.Random) -> list[Item]:
        """`count` different items; raises ValueError when there are fewer."""
        return rng.sample(list(self._items), count)

    def state_dict(self) -> dict[str, Any]:
        return {"items": list(self._items)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._items.clear()
        self._items.extend(state["items"])


def _sigmoid(x: float) -> float:
    # of the tanh: exp() would overflow after a loss that has exploded
    return 0.5 * (1 + math.tanh(x / 2))
