"""A key-value cache with room for all tokens of a turn: appending a token copies that token only.

transformers' DynamicCache concatenates, which copies the whole cache for every token; on a CPU that is most
of the time that generation takes (`python -m benchmarks.rollout`).
"""

from typing import Any

import torch
from transformers import DynamicCache, DynamicLayer, PretrainedConfig


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
        keys, values = self._key_buffer[:, :, : self._length], self._value_buffer[:, :, : self._length]
        self.keys, self.values = keys, values
        return keys, values


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """For models whose layers all attend to everything (Qwen2, Llama). Raises ValueError for others."""
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("this model's layers need caches of other kinds than full attention")
    cache.layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    return cache
