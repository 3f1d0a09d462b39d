"""Batches side by side give what they give one after the other, to the bit."""

import threading
from collections.abc import Iterator

import pytest
import torch

from dgpo_core.threads import available_threads, side_by_side, single_threaded

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_two_run_at_a_time() -> None:
    both = threading.Barrier(2, timeout=30)

    def number(item: int) -> tuple[int, int]:
        both.wait()  # breaks unless another runs beside it
        return item, torch.get_num_threads()

    assert list(side_by_side(number, range(6), CPU)) == [(i, 1) for i in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_mode_holds(mode: type[torch.no_grad]) -> None:
    def modes(_: int) -> tuple[bool, bool]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    with mode():
        assert set(side_by_side(modes, range(3), CPU)) == {modes(0)}


def test_the_first_failure_is_raised_and_nothing_more_is_begun() -> None:
    begun = []

    def fail(item: int) -> int:
        begun.append(item)
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(side_by_side(fail, range(100), CPU))
    assert len(begun) < 100


def test_all_else_computes_with_one_thread() -> None:
    with single_threaded():
        assert torch.get_num_threads() == 1 and available_threads() == 2
        both = threading.Barrier(2, timeout=30)
        assert len(list(side_by_side(lambda _: both.wait(), range(2), CPU))) == 2
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == available_threads() == 2
