"""Data parallelism: every process holds the whole batch and works on its share of the micro-batches.

What the shares give is added up: gradients before an update, sums of losses before they are read. As every
process knows the whole batch, averages have the same denominators whatever the number of processes, and the
update is that of one process to rounding. The processes are those of torch.distributed's default group;
without one (a single process) nothing is sent.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dgpo_core.config.training import ComputeConfig

Item = TypeVar("Item")

# How long a process waits for the others: the first one alone reads inputs and writes results.
PATIENCE = timedelta(hours=1)


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """Join the processes that were started together (RANK, WORLD_SIZE, ... in the environment)."""
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def leads() -> bool:
    """Return whether this is the one process that writes."""
    return rank() == 0


def wait() -> None:
    """Return when all processes have called this."""
    if processes() > 1:
        all_sum({"here": 1.0})


def share(items: Iterable[Item]) -> list[Item]:
    """Return this process's items, every `processes()`-th: neighbours in a sorted list are dealt out."""
    return list(items)[rank() :: processes()]


def padded_share(items: Iterable[Item], lockstep: bool) -> list[tuple[Item, bool]]:
    """Return this process's items, each with whether it counts.

    In `lockstep` every process gets equally many: where the items do not go round, the first one is given
    once more and does not count.
    """
    everything = list(items)
    own = [(item, True) for item in share(everything)]
    longest = -(-len(everything) // processes())
    padding = [(item, False) for item in everything[:1] if lockstep and len(own) < longest]
    return own + padding


def further_group() -> dist.ProcessGroup | None:
    """Return another group of all processes, for threads that talk beside each other; all must call this."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if processes() > 1 else None


def gather(own: list[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """Collect the results of all processes, in the order of the list whose `share` each has worked on.

    `group` is a `further_group`, where other threads may be talking in the default one.
    """
    if processes() == 1:
        return own
    parts: list[Any] = [None] * processes()
    dist.all_gather_object(parts, own, group)
    width = max(len(part) for part in parts)
    return [part[i] for i in range(width) for part in parts if i < len(part)]


def all_sum(totals: dict[str, float]) -> dict[str, float]:
    """Add up numbers over all processes; every process must have the same keys in the same order."""
    if processes() == 1:
        return totals
    values = torch.tensor(list(totals.values()), dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(totals, values.tolist(), strict=True))


def add_gradients(module: torch.nn.Module) -> None:
    """Sum every parameter's gradient over all processes, in place; one that none has stays None."""
    if processes() == 1:
        return
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    dist.all_reduce(present)
    for parameter, found in zip(parameters, present.tolist(), strict=True):
        if found:
            if parameter.grad is None:  # this process's share had no pass through it
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def autocast(config: ComputeConfig) -> contextlib.AbstractContextManager[Any]:
    """Return the precision to compute in: bfloat16 over float32 weights, or that of the weights."""
    if config.precision == "float32" or config.engine == "deepspeed":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)
