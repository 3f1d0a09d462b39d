"""Independent batches side by side on a CPU: each in a thread of its own that computes with one.

One operation of a small model is too short to be split: two threads side by side do nearly twice as much as
two that share every operation (docs/benchmarks.md). What a batch gives does not depend on the number of
threads, and results come in the batches' order, so sums over them are the same to the bit.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_reserved = 0  # threads for `side_by_side` while all else computes with one


@contextmanager
def single_threaded() -> Iterator[None]:
    """Compute with one thread, so that their number shows in no sum; `side_by_side` still has all."""
    global _reserved
    outer, before = _reserved, torch.get_num_threads()
    _reserved = available_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _reserved = outer
        torch.set_num_threads(before)


def available_threads() -> int:
    """Return how many batches run at a time on a CPU: torch's threads (OMP_NUM_THREADS)."""
    return _reserved or torch.get_num_threads()


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield `function` of each item, in order; on a CPU as many at a time as there are threads.

    The functions run with the caller's grad and inference mode. Elsewhere than on a CPU they run one after
    the other, in the caller's thread.
    """
    threads = available_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    before = torch.get_num_threads()

    def call(item: Item) -> Result:
        torch.set_num_threads(1)  # of this thread alone
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # what threads to come begin with
