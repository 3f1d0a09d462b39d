"""A key-value cache with room for all tokens of a turn: appending a token copies that token only.

transformers' DynamicCache concatenates, which copies the whole cache for every token; on a CPU that is most
of the time that generation takes (`python -m benchmarks.rollout`). It can begin with what an earlier turn
computed of its rows.

Batched generation with plain transformers: the default engine, on CPU or GPU.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer, PretrainedConfig, PreTrainedModel

from dgpo_core.agent.engine import Endings, Finish, Generation, Request, end_tokens
from dgpo_core.config.agent import RolloutConfig, Sampling

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


COMPACT = 0.7  # share of unfinished rows below which the finished ones are taken out of the cache


class TransformersEngine:
    """Left-padded batches of requests of similar length, cut by padded tokens.

    Sampling draws one uniform number a token from a stream that belongs to the request, so what an episode
    samples does not depend on which other episodes share its batch. A request with a memory leaves its keys
    and values there, as long as there is room, and its episode's next turn reads only what is new.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: RolloutConfig) -> None:
        self.model, self.tokenizer, self._config = model, tokenizer, config
        rows = model.config.get_text_config().vocab_size
        self.endings = Endings(tokenizer, end_tokens(tokenizer, model.generation_config), rows)

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], sampling: Sampling, stop: tuple[str, ...]
    ) -> list[Generation]:
        rows = [_Row(request, sampling) for request in requests]
        self._room = self._config.kept_tokens - sum(row.past for row in rows)
        with self._precision():
            for batch in self._batches(rows):
                self._run(batch, sampling, stop)
        return [Generation(row.ids, row.logprobs, row.finish or Finish.LENGTH) for row in rows]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._config.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def _batches(self, rows: list["_Row"]) -> list[list["_Row"]]:
        """Groups of similar length whose padded tokens, with what may be generated, stay in the limit."""
        batches: list[list[_Row]] = []
        widths = [0, 0, 0]
        for row in sorted(rows, key=lambda row: row.widths):
            widths = [max(pair) for pair in zip(widths, row.widths, strict=True)]
            if not batches or sum(widths) * (len(batches[-1]) + 1) > self._config.batch_tokens:
                batches.append([])
                widths = list(row.widths)
            batches[-1].append(row)
        return batches

    def _run(self, rows: list["_Row"], sampling: Sampling, stop: tuple[str, ...]) -> None:
        """Prefill, then one token a step; rows that are finished leave the batch many at a time."""
        cache, ids, mask, positions = self._begin(rows)
        batch = rows  # those in the cache
        while True:
            hidden = self.model.base_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            logits = self.model.get_output_embeddings()(hidden)[:, : self.endings.known].float()
            tokens, logprobs = _sample(logits, batch, sampling)
            self._append(batch, tokens.tolist(), logprobs.tolist(), stop)
            going = [place for place, row in enumerate(batch) if row.finish is None]
            if len(going) <= COMPACT * len(batch):
                self._keep(batch, cache, mask)
                if not going:
                    return
                batch = [batch[place] for place in going]
                chosen = torch.tensor(going, device=ids.device)
                cache.batch_select_indices(chosen)
                tokens, mask, positions = tokens[chosen], mask[chosen], positions[chosen]
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)

    def _begin(self, rows: list["_Row"]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cache with what was kept; ids to read, the mask of both, and the positions of the ids."""
        device = self.model.device
        capacity = sum(max(column) for column in zip(*(row.widths for row in rows), strict=True))
        cache = preallocated_cache(self.model.config, capacity, [row.kept for row in rows])
        past = _left_pad([row.kept.ids if row.kept else [] for row in rows], device)[1]
        ids, new = _left_pad([row.unread for row in rows], device)
        mask = torch.cat([past, new], dim=1)
        for row in rows:  # the cache has a copy
            self._room += row.past
            row.forget()
        return cache, ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, past.shape[1] :]

    def _keep(self, batch: list["_Row"], cache: DynamicCache, mask: torch.Tensor) -> None:
        """Finished rows' keys and values go into their memories; `mask` [rows, tokens in the cache]."""
        for place, row in enumerate(batch):
            memory = row.request.memory
            if row.finish is None or memory is None or not memory.wanted:
                continue
            # the last token was not read, and what follows it is not the row's
            ids = [*row.request.token_ids, *row.ids[:-1]]
            if len(ids) <= self._room:
                self._room -= len(ids)
                columns = mask[place].nonzero()[: len(ids), 0]
                memory.kept = Kept(ids, copied(cache, place, columns))

    def _append(
        self, batch: list["_Row"], tokens: list[int], logprobs: list[float], stop: tuple[str, ...]
    ) -> None:
        """Give each unfinished row its token, and finish the rows that it completes."""
        for row, token, logprob in zip(batch, tokens, logprobs, strict=True):
            if row.finish is not None:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.finish = self.endings.after(row.ids, row.request.max_new_tokens, stop)


class _Row:
    """One request under way; `kept` is what its episode's last turn left of it."""

    def __init__(self, request: Request, sampling: Sampling) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        count = request.max_new_tokens if sampling.temperature > 0 else 0
        self.uniforms = np.random.default_rng(request.seed).random(count)
        kept: Kept | None = request.memory.kept if request.memory else None
        past = len(kept.ids) if kept else 0
        self.kept = kept
        if kept is None or kept.ids != request.token_ids[:past] or past >= len(request.token_ids):
            self.forget()

    @property
    def past(self) -> int:
        """The request's tokens whose keys and values were kept."""
        return len(self.kept.ids) if self.kept else 0

    @property
    def unread(self) -> list[int]:
        """The request's tokens that the model has to read."""
        return self.request.token_ids[self.past :]

    @property
    def widths(self) -> tuple[int, int, int]:
        """Tokens that were read, that are to be read and that may be generated."""
        return self.past, len(self.request.token_ids) - self.past, self.request.max_new_tokens

    def forget(self) -> None:
        self.kept = None
        if self.request.memory is not None:
            self.request.memory.forget()


def _left_pad(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [rows, longest], int64."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _sample(logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens and their log-probabilities, [rows] each; `logits` [rows, known ids] float32."""
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        tokens = logits.argmax(-1)
    else:
        logprobs = (logits / sampling.temperature).log_softmax(-1)
        drawn = [0.0 if row.finish else row.uniforms[len(row.ids)] for row in rows]
        cumulative = logprobs.double().exp().cumsum(-1)
        scaled = torch.tensor(drawn, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, scaled, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
