"""The default engine: batched generation with transformers, on a CPU or a GPU.

Its key-value cache has room for all tokens of a turn from the start. transformers' DynamicCache concatenates,
which copies the whole cache for every token, and on a CPU that is most of the time of a generation
(`python -m benchmarks.rollout`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, DynamicLayer, PretrainedConfig, PreTrainedModel

from dgpo_core.agent.engine import EpisodeCache, FinishReason, Generation, Request, StopCriteria, eos_ids
from dgpo_core.config.agent import RolloutConfig, Sampling
from dgpo_core.threads import side_by_side

COMPACT = 0.7  # share of unfinished rows below which the finished ones are taken out of the cache

KeyValues = tuple[torch.Tensor, torch.Tensor]  # of one layer: [heads, tokens, head size] each


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the tokens `ids`, for each layer: what an episode's next turn begins with."""

    ids: list[int]
    states: list[KeyValues]


class TransformersEngine:
    """Generates in left-padded batches of requests of similar length, cut by padded tokens.

    Sampling draws one uniform number a token from a stream that belongs to the request, so what an episode
    samples does not depend on which other episodes share its batch. A request with a cache leaves its keys
    and values there, as long as there is room, and its episode's next turn reads only what is new.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: RolloutConfig) -> None:
        self.model, self.tokenizer, self._config = model, tokenizer, config
        rows = model.config.get_text_config().vocab_size
        self.stop_criteria = StopCriteria(tokenizer, eos_ids(tokenizer, model.generation_config), rows)

    @torch.inference_mode()
    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        stop: tuple[str, ...],
        on_token: Callable[[Request, int], None] | None = None,
    ) -> list[Generation]:
        """Continue each request; call `on_token` with each token when it is sampled, EOS too.

        What `on_token` raises ends the generation.
        """
        rows = [_Row(request, sampling) for request in requests]
        batches = self._batches(rows)
        self._grant_room(batches)
        self._on_token = on_token
        narrow = self._config.precision == "bfloat16"

        def run(batch: list[_Row]) -> None:
            with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=narrow):
                self._run(batch, sampling, stop)

        for _ in side_by_side(run, batches, self.model.device):
            pass
        return [Generation(row.ids, row.logprobs, row.finish or FinishReason.LENGTH) for row in rows]

    def _batches(self, rows: list["_Row"]) -> list[list["_Row"]]:
        """Group rows of similar length; padded tokens, with what may be generated, stay within the limit."""
        batches: list[list[_Row]] = []
        widths = [0, 0, 0]
        for row in sorted(rows, key=lambda row: row.widths):
            widths = [max(pair) for pair in zip(widths, row.widths, strict=True)]
            if not batches or sum(widths) * (len(batches[-1]) + 1) > self._config.batch_tokens:
                batches.append([])
                widths = list(row.widths)
            batches[-1].append(row)
        return batches

    def _grant_room(self, batches: list[list["_Row"]]) -> None:
        """Decide which rows keep keys and values for their next turn: no more tokens than `kept_tokens`.

        A row needs what it may become, beside what rows without room still have of their last turn.
        """
        held = sum(row.past for batch in batches for row in batch)
        for row in (row for batch in batches for row in batch):
            own = row.request.cache
            more = len(row.request.token_ids) + row.request.max_new_tokens - 1 - row.past
            if own is not None and own.renew and held + more <= self._config.kept_tokens:
                row.keeper = own
                held += more

    def _run(self, rows: list["_Row"], sampling: Sampling, stop: tuple[str, ...]) -> None:
        """Prefill, then sample one token a step; finished rows leave the batch many at a time."""
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
            logits = self.model.get_output_embeddings()(hidden)[:, : self.stop_criteria.known].float()
            tokens, logprobs = _sample(logits, batch, sampling)
            self._append(batch, tokens.tolist(), logprobs.tolist(), stop)
            going = [place for place, row in enumerate(batch) if row.finish is None]
            if len(going) <= COMPACT * len(batch):
                self._store_prefixes(batch, cache, mask)
                if not going:
                    return
                batch = [batch[place] for place in going]
                chosen = torch.tensor(going, device=ids.device)
                cache.batch_select_indices(chosen)
                tokens, mask, positions = tokens[chosen], mask[chosen], positions[chosen]
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)

    def _begin(self, rows: list["_Row"]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the cache with the rows' prefixes, the ids to read, the mask of both, and the positions."""
        device = self.model.device
        capacity = sum(max(column) for column in zip(*(row.widths for row in rows), strict=True))
        cache = preallocated_cache(self.model.config, capacity, [row.prefix for row in rows])
        past = _left_pad([row.prefix.ids if row.prefix else [] for row in rows], device)[1]
        ids, new = _left_pad([row.unread for row in rows], device)
        mask = torch.cat([past, new], dim=1)
        for row in rows:  # the cache has a copy
            row.drop_prefix()
        return cache, ids, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, past.shape[1] :]

    def _store_prefixes(self, batch: list["_Row"], cache: DynamicCache, mask: torch.Tensor) -> None:
        """Leave finished rows' keys and values in their caches; `mask` [rows, tokens in the cache]."""
        for place, row in enumerate(batch):
            if row.finish is None or row.keeper is None:
                continue
            # the last token was not read, and what follows it is not the row's
            ids = [*row.request.token_ids, *row.ids[:-1]]
            columns = mask[place].nonzero()[: len(ids), 0]
            row.keeper.content = Prefix(ids, _row_states(cache, place, columns))

    def _append(
        self, batch: list["_Row"], tokens: list[int], logprobs: list[float], stop: tuple[str, ...]
    ) -> None:
        """Give each unfinished row its token, and finish the rows that it completes."""
        for row, token, logprob in zip(batch, tokens, logprobs, strict=True):
            if row.finish is not None:
                continue
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.finish = self.stop_criteria.finish(row.ids, row.request.max_new_tokens, stop)
            if self._on_token is not None:
                self._on_token(row.request, token)


class _Row:
    """One request in generation; `prefix` is what its episode's last turn left in its cache."""

    def __init__(self, request: Request, sampling: Sampling) -> None:
        self.request = request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish: FinishReason | None = None
        self.keeper: EpisodeCache | None = None  # of its keys and values, for the episode's next turn
        count = request.max_new_tokens if sampling.temperature > 0 else 0
        self.uniforms = np.random.default_rng(request.seed).random(count)
        prefix: Prefix | None = request.cache.content if request.cache else None
        past = len(prefix.ids) if prefix else 0
        self.prefix = prefix
        if prefix is None or prefix.ids != request.token_ids[:past] or past >= len(request.token_ids):
            self.drop_prefix()

    @property
    def past(self) -> int:
        """The number of the request's tokens whose keys and values are there already."""
        return len(self.prefix.ids) if self.prefix else 0

    @property
    def unread(self) -> list[int]:
        """The request's tokens that the model has to read."""
        return self.request.token_ids[self.past :]

    @property
    def widths(self) -> tuple[int, int, int]:
        """The numbers of tokens that were read, that are to be read, and that may be generated."""
        return self.past, len(self.request.token_ids) - self.past, self.request.max_new_tokens

    def drop_prefix(self) -> None:
        self.prefix = None
        if self.request.cache is not None:
            self.request.cache.clear()


def _left_pad(sequences: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, [rows, longest], int64."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _sample(logits: torch.Tensor, rows: list[_Row], sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next tokens and their log-probabilities, [rows] each; `logits` [rows, known ids] float32."""
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


def preallocated_cache(
    config: PretrainedConfig, capacity: int, prefixes: Sequence[Prefix | None] = ()
) -> DynamicCache:
    """Return a cache for `capacity` tokens a row that begins with the rows' `prefixes`, right-aligned.

    It is for models whose layers all attend to everything (Qwen2, Llama). Raises ValueError for others.
    """
    cache = DynamicCache(config=config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("this model's layers need caches of other kinds than full attention")
    layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    if any(prefixes):
        for number, layer in enumerate(layers):
            layer.begin([prefix.states[number] if prefix else None for prefix in prefixes])
    cache.layers = list(layers)
    return cache


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
        self._set_views()
        self.is_initialized = True

    def begin(self, rows: list[KeyValues | None]) -> None:
        """Write the rows' earlier tokens, right-aligned; zeros, to be masked, fill what a row lacks."""
        first = next(filter(None, rows))  # under autocast keys and values are of two types
        keys, values = (part.new_empty(len(rows), part.shape[0], 0, part.shape[2]) for part in first)
        self.lazy_initialization(keys, values)
        self._length = max(keys.shape[1] for keys, _ in filter(None, rows))
        keys, values = self._set_views()
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
        return self._set_views()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._key_buffer, self._value_buffer = self._key_buffer[indices], self._value_buffer[indices]
        self._set_views()

    def _set_views(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys: torch.Tensor = self._key_buffer[:, :, : self._length]
        self.values: torch.Tensor = self._value_buffer[:, :, : self._length]
        return self.keys, self.values


def _row_states(cache: DynamicCache, place: int, columns: torch.Tensor) -> list[KeyValues]:
    """Copy one row's keys and values at the `columns` [tokens] out of each layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    return [(layer.keys[place][:, columns], layer.values[place][:, columns]) for layer in layers]
