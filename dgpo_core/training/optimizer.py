"""Optimisers and learning-rate schedules."""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Callable[[int], float]


def adamw(
    parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999) with decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999))


def cosine(total_steps: int, warmup_steps: int = 0) -> Schedule:
    """Factor on the learning rate: linear warm-up, then a half cosine to zero."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def trapezoid(total_steps: int, warmup_steps: int, decay_share: float = 0.3) -> Schedule:
    """Factor on the learning rate: linear warm-up, 1, and a linear end over the last `decay_share`."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / max(1, warmup_steps), (total_steps - step) / (decay_share * total_steps))

    return factor


def constant(warmup_steps: int = 0) -> Schedule:
    """Factor on the learning rate: linear warm-up, then 1."""
    return lambda step: min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule) -> LambdaLR:
    return LambdaLR(optimizer, schedule)


def step(
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: LambdaLR,
    max_grad_norm: float,
) -> float:
    """Clip, update, clear; returns the gradient norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
