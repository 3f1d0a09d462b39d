"""Data parallelism: every process holds the whole batch and works on its share of the passes.

What the shares give is added up: gradients before an update, sums of losses before they are read. As every
process knows the whole batch, averages have the same denominators whatever the number of processes, and the
update is that of one process to rounding. The processes are those of torch.distributed's default group;
without one (a single process) nothing is sent.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(items: Iterable[Item]) -> list[Item]:
    """This process's items, every `processes()`-th: neighbours in a list sorted by size are dealt out."""
    return list(items)[rank() :: processes()]


def joined(own: list[Item]) -> list[Item]:
    """The items of all processes' results, in the order of the list whose `share` each has worked on."""
    if processes() == 1:
        return own
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, own)
    width = max(len(part) for part in parts)
    return [part[i] for i in range(width) for part in parts if i < len(part)]


def added(totals: dict[str, float]) -> dict[str, float]:
    """Sums over all processes; every process must have the same keys in the same order."""
    if processes() == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64, device=_device())
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def add_gradients(module: torch.nn.Module) -> None:
    """Sum every parameter's gradient over all processes, in place; one that none has stays None."""
    if processes() == 1:
        return
    parameters = list(module.parameters())
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=_device())
    dist.all_reduce(present)
    for parameter, found in zip(parameters, present.tolist(), strict=True):
        if found:
            if parameter.grad is None:  # this process's share had no pass through it
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def _device() -> torch.device:
    """Where the group's backend wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
