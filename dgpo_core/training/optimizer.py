"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[int], float]  # update, from 0 on -> factor on the learning rate


@dataclass(frozen=True)
class Optimization:
    """Settings of AdamW and its schedule."""

    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    schedule: Schedule


def adamw(
    parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """Return AdamW (0.9, 0.999) with decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999))


def cosine(total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Return a schedule of linear warm-up, then a half cosine to zero."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def trapezoid(total_steps: int, warmup_steps: int, decay_share: float = 0.3) -> Schedule:
    """Return a schedule of linear warm-up, 1, and a linear fall to 0 over the last `decay_share`."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps), (total_steps - step) / (decay_share * total_steps))

    return factor


def constant(warmup_steps: int = 0) -> Schedule:
    """Return a schedule of linear warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


class Stepper:
    """Clips, steps, clears and saves the optimisers of one model and their schedule as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer, schedule: Schedule, max_grad_norm: float) -> None:
        self._parts = [(optimizer, LambdaLR(optimizer, schedule)) for optimizer in optimizers]
        self._max_grad_norm = max_grad_norm

    @property
    def learning_rate(self) -> float:
        """Return the first optimiser's rate of its first group at the next step."""
        return float(self._parts[0][1].get_last_lr()[0])

    def step(self) -> float:
        """Clip all gradients together, update, clear; returns their norm before clipping.

        A norm that is nan or infinite updates nothing.
        """
        groups = [group for optimizer, _ in self._parts for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm))
        if math.isfinite(norm):
            for optimizer, schedule in self._parts:
                optimizer.step()
                schedule.step()
        self.clear()
        return norm

    def clear(self) -> None:
        """Forget the gradients."""
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [[part.state_dict() for part in pair] for pair in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for (optimizer, schedule), saved in zip(self._parts, state["parts"], strict=True):
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
