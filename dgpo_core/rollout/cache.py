"""A key-value cache with room for all tokens of a turn: appending a token copies that token only.

transformers' DynamicCache concatenates, which copies the whole cache for every token; on a CPU that is most
of the time that generation takes (`python -m benchmarks.rollout`). It can begin with what an earlier turn
computed of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer, PretrainedConfig

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


@dataclass(frozen=True)
class Kept:
    """Keys and values of the tokens `ids`, one pair a layer: [heads, tokens, head size] each."""

    ids: list[int]
    states: list[Pair]


class PreallocatedLayer(DynamicLayer):
    """Keys and values [batch, heads, tokens, head size] as views of buffers with `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (*key_states.shape[:2], self._capacity)
        self._key_buffer = key_states.new_empty(*shape, key_states.shape[-1])
        self._value_buffer = value_states.new_empty(*shape, value_states.shape[-1])
        self._length = 0
        self._show()
        self.is_initialized = True

    def begin(self, rows: list[Pair | None]) -> None:
        """The rows' earlier tokens, right-aligned; zeros, to be masked, where a row has fewer or none."""
        first = next(filter(None, rows))  # under autocast keys and values are of two types
        keys, values = (part.new_empty(len(rows), part.shape[0], 0, part.shape[2]) for part in first)
        self.lazy_initialization(keys, values)
        self._length = max(keys.shape[1] for keys, _ in filter(None, rows))
        keys, values = self._show()
        keys.zero_()
        values.zero_()
        for place, row in enumerate(rows):
            if row is not None:
                start = self._length - row[0].shape[1]
                keys[place, :, start:], values[place, :, start:] = row

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens. Raises IndexError when there is no room for them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._length + key_states.shape[-2]
        if end > self._capacity:
            raise IndexError(f"the cache has room for {self._capacity} tokens, not for {end}")
        self._key_buffer[:, :, self._length : end] = key_states
        self._value_buffer[:, :, self._length : end] = value_states
        self._length = end
        return self._show()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._key_buffer, self._value_buffer = self._key_buffer[indices], self._value_buffer[indices]
        self._show()

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys: torch.Tensor = self._key_buffer[:, :, : self._length]
        self.values: torch.Tensor = self._value_buffer[:, :, : self._length]
        return self.keys, self.values


def preallocated_cache(
    config: PretrainedConfig, capacity: int, rows: Sequence[Kept | None] = ()
) -> DynamicCache:
    """For models whose layers all attend to everything (Qwen2, Llama). Raises ValueError for others.

    It begins with what was kept of the `rows`, right-aligned to the longest.
    """
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("this model's layers need caches of other kinds than full attention")
    layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    if any(rows):
        for number, layer in enumerate(layers):
            layer.begin([row.states[number] if row else None for row in rows])
    cache.layers = list(layers)
    return cache


def copied(cache: DynamicCache, place: int, columns: torch.Tensor) -> list[Pair]:
    """One row's keys and values at the columns [tokens], a pair a layer, apart from the cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    return [(layer.keys[place][:, columns], layer.values[place][:, columns]) for layer in layers]
