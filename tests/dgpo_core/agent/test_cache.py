"""The preallocated cache against transformers' own."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, Qwen2Config

from dgpo_core.agent.transformers_engine import preallocated_cache


def states(model: PreTrainedModel, cache: Any, ids: torch.Tensor, stay: list[int]) -> list[torch.Tensor]:
    """Hidden states of six tokens, then, of the rows that stay, of one and of two more."""
    found = []
    with torch.inference_mode():
        found.append(model.base_model(input_ids=ids[:, :6], past_key_values=cache).last_hidden_state)
        if len(stay) < len(ids):
            cache.batch_select_indices(torch.tensor(stay))
        parts = (ids[stay, 6:7], ids[stay, 7:])
        found += [model.base_model(input_ids=part, past_key_values=cache).last_hidden_state for part in parts]
    return found


@pytest.mark.parametrize("stay", [[0, 1, 2], [0, 2], [1]])
def test_same_states_as_dynamic_cache(model: PreTrainedModel, stay: list[int]) -> None:
    ids = torch.randint(100, (3, 9), generator=torch.Generator().manual_seed(0))
    first = states(model, preallocated_cache(model.config, 9), ids, stay)
    second = states(model, DynamicCache(config=model.config), ids, stay)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    whole = model.base_model(input_ids=ids[stay]).last_hidden_state[:, 7:]
    torch.testing.assert_close(first[-1], whole, rtol=1e-4, atol=1e-5)


def test_full_cache(model: PreTrainedModel) -> None:
    cache = preallocated_cache(model.config, 4)
    with torch.inference_mode(), pytest.raises(IndexError, match="room for 4 tokens, not for 5"):
        model.base_model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache)


def test_other_kinds_of_layers_are_refused() -> None:
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(ValueError, match="other kinds than full attention"):
        preallocated_cache(config, 4)
