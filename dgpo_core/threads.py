"""Independent batches side by side on a CPU: each in a thread of its own that computes with one.

One operation of a small model is too short to be split: two threads side by side do nearly twice as much as
two that share every operation (docs/benchmarks.md). What a batch gives does not depend on the number of
threads, and results come in the batches' order, so sums over them are the same to the bit.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield `function` of each item, in order; on a CPU as many at a time as torch has threads.

    The functions run with the caller's grad and inference mode. Elsewhere than on a CPU they run one after
    the other, in the caller's thread.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def call(item: Item) -> Result:
        torch.set_num_threads(1)  # of this thread alone
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return function(item)

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # what threads to come begin with
