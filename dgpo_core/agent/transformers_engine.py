"""The default engine: continuous batching with transformers, on a CPU or a GPU.

A session has slots, each with room for one episode's keys and values. A request takes a slot as soon as one
is free, reads what is new in it, and then gets a token a step together with all others; its episode's next
turn goes on in the same slot. transformers' DynamicCache concatenates, which copies the whole cache for every
token, and on a CPU that is most of the time of a generation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, DynamicLayer, PretrainedConfig, PreTrainedModel

from dgpo_core.agent.engine import Finished, Generation, Request, StopCriteria, eos_ids
from dgpo_core.config.agent import RolloutConfig, Sampling, slot_room

STRIDE = 4  # tokens that `advance` gives each request


class TransformersEngine:
    """Continues requests in sessions, each with up to `rollout.slots` at a time.

    Sampling draws one uniform number a token from a stream that belongs to the request, so what an episode
    samples does not depend on which other episodes share its batch.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, config: RolloutConfig) -> None:
        self.model, self.tokenizer, self._config = model, tokenizer, config
        rows = model.config.get_text_config().vocab_size
        self.stop_criteria = StopCriteria(tokenizer, eos_ids(tokenizer, model.generation_config), rows)

    @property
    def lane(self) -> int | None:
        """Return the slots: on a CPU sessions run side by side, a thread each."""
        return self._config.slots if self.model.device.type == "cpu" else None

    def session(self, stop: tuple[str, ...]) -> "TransformersSession":
        return TransformersSession(self.model, self.stop_criteria, self._config, stop)


@dataclass(eq=False)
class _Row:
    """A request in its slot; `ids` are the tokens of which the slot has keys and values between turns."""

    request: Request
    sampling: Sampling
    place: int = -1
    finished: bool = False
    ids: list[int] | None = None

    @property
    def kept(self) -> bool:
        """Return whether the finished request's slot waits for its episode's next turn."""
        return self.request.cache is not None and self.request.cache.content is self


class TransformersSession:
    """Requests in slots. `batch_tokens` limits the padded tokens of a pass that reads."""

    paced = True

    def __init__(
        self, model: PreTrainedModel, criteria: StopCriteria, config: RolloutConfig, stop: tuple[str, ...]
    ) -> None:
        self._model, self._criteria, self._config, self._stop = model, criteria, config, stop
        self._narrow = config.precision == "bfloat16"
        self._ends: Bool[Tensor, " V"] = torch.tensor(criteria.may_end(stop), device=model.device)
        self._waiting: list[_Row] = []
        self._rows: list[_Row | None] = []  # slot by slot
        self._slots = Slots(model)
        self._finished: list[Finished] = []

    def add(self, requests: list[Request], sampling: Sampling) -> None:
        self._waiting += [_Row(request, sampling) for request in requests]

    def close(self) -> None:
        """Do nothing: memory goes with the session."""

    @torch.inference_mode()
    def advance(self) -> list[Finished]:
        """Let requests into free slots, and sample up to STRIDE tokens for each that is in one."""
        with torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=self._narrow):
            for rows in self._reading(self._admit()):
                self._read(rows)
            for _ in range(STRIDE):
                if not any(map(_at_work, self._rows)):
                    break
                self._step()
        finished, self._finished = self._finished, []
        return finished

    # --- slots

    def _admit(self) -> list[_Row]:
        """Give waiting requests their episode's slot or a free one; return those that got one."""
        self._rows = [row if row and (_at_work(row) or row.kept) else None for row in self._rows]
        kept_alone = self._free_slot() is None and not any(map(_at_work, self._rows))
        if kept_alone and not any(map(self._has_own_slot, self._waiting)):
            self._rows = [None] * len(self._rows)  # kept for turns that others would wait for in vain
        admitted, waiting = [], []
        for row in self._waiting:
            own = self._own_slot(row)
            place = self._free_slot() if own is None else own
            if place is None:
                waiting.append(row)
                continue
            if place == len(self._rows):
                self._rows.append(None)
            self._rows[place], row.place = row, place
            admitted.append(row)
        self._waiting = waiting
        self._arrange()
        return admitted

    def _free_slot(self) -> int | None:
        """Return the first free slot, which may be a new one; None when all are taken."""
        free = (place for place, row in enumerate(self._rows) if row is None)
        more = len(self._rows) if len(self._rows) < self._config.slots else None
        return next(free, more)

    def _has_own_slot(self, row: _Row) -> bool:
        """Return whether the episode's last turn is still in its slot."""
        last: _Row | None = row.request.cache.content if row.request.cache else None
        return last is not None and last.place < len(self._rows) and self._rows[last.place] is last

    def _own_slot(self, row: _Row) -> int | None:
        """Return the slot with the beginning of the request's tokens, and note how far it goes."""
        if row.request.cache is None or not self._has_own_slot(row):
            return None
        last: _Row = row.request.cache.content
        row.request.cache.clear()
        past = len(last.ids or ())
        if last.ids == row.request.token_ids[:past] and past < len(row.request.token_ids):
            row.ids = last.ids
            return last.place
        self._rows[last.place] = None
        return None

    def _arrange(self) -> None:
        """Make room for what the requests may become, and move the last rows at work into free places."""
        requests = [row.request for row in self._rows if row]
        longest = max((len(r.token_ids) + r.max_new_tokens for r in requests), default=0)
        self._slots.grow(len(self._rows), longest, max((r.max_new_tokens for r in requests), default=0))
        for place in [place for place, row in enumerate(self._rows) if row is None]:
            working = [row for row in self._rows[place:] if row is not None and not row.finished]
            if not working:
                break
            last = working[-1]
            self._slots.move(last.place, place)
            self._rows[place], self._rows[last.place], last.place = last, None, place

    # --- passes through the model

    def _reading(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """Yield groups of rows with about equally many tokens to read, padded ones within the limit."""
        group: list[_Row] = []
        for row in sorted(rows, key=lambda row: (row.ids is not None, -len(_unread(row)))):
            mixed = group and (group[0].ids is None) != (row.ids is None)
            if group and (mixed or len(_unread(group[0])) * (len(group) + 1) > self._config.batch_tokens):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _read(self, rows: list[_Row]) -> None:
        """Read what is new in the rows' requests, and sample the first token of each."""
        slots, device = self._slots, self._model.device
        unread = [_unread(row) for row in rows]
        counts = torch.tensor([len(ids) for ids in unread])
        ids = torch.zeros(len(rows), int(counts.max()), dtype=torch.long)
        for line, new in zip(ids, unread, strict=True):
            line[: len(new)] = torch.tensor(new)
        for row in rows:
            slots.begin(row.place, len(row.ids or ()), row.request, row.sampling)
        places = torch.tensor([row.place for row in rows], device=device)
        hidden = slots.forward(self._model, ids.to(device), places, fresh=rows[0].ids is None)
        counts = counts.to(device)
        slots.lengths[places] += counts
        self._sample(places, hidden[torch.arange(len(rows), device=device), counts - 1], rows)

    def _step(self) -> None:
        """Sample a token for each row at work, from the one before."""
        slots = self._slots
        rows = self._rows[: 1 + max(row.place for row in self._rows if row and _at_work(row))]
        places = torch.arange(len(rows), device=self._model.device)
        hidden = slots.forward(self._model, slots.newest[places][:, None], places, leading=True)
        slots.lengths[places] += slots.working[places].long()
        self._sample(places, hidden[:, -1], rows)

    def _sample(
        self, places: Int[Tensor, " B"], hidden: Float[Tensor, "B H"], rows: Sequence[_Row | None]
    ) -> None:
        """Give rows their next tokens, and finish those that it completes."""
        slots = self._slots
        logits = self._model.get_output_embeddings()(hidden)[:, : self._criteria.known].float()
        tokens, logprobs = sample(logits, slots.temperatures[places], slots.next_uniforms(places))
        slots.append(places, tokens, logprobs)
        for row in rows:
            if row is not None and not row.finished and row.request.on_token is not None:
                self._tell(row, row.request.on_token)
        may = slots.working[places] & (self._ends[tokens] | (slots.counts[places] >= slots.limits[places]))
        for place in places[may].tolist():
            self._end(place)

    def _tell(self, row: _Row, on_token: Callable[[int], None]) -> None:
        """Tell whoever listens of the newest token; what it raises is the request's end."""
        try:
            on_token(int(self._slots.newest[row.place]))
        except Exception as error:
            self._leave(row)
            self._finished.append((row.request, error))

    def _end(self, place: int) -> None:
        """Finish the row in a slot if its tokens say so, and leave the slot to its episode's next turn."""
        row = self._rows[place]
        assert row is not None
        request = row.request
        ids, logprobs = self._slots.written(place)
        reason = self._criteria.finish(ids, request.max_new_tokens, self._stop)
        if reason is None:
            return
        self._leave(row)
        row.ids = [*request.token_ids, *ids[:-1]]  # the last token was not read
        if request.cache is not None and request.cache.renew:
            request.cache.content = row
        self._finished.append((request, Generation(ids, logprobs, reason)))

    def _leave(self, row: _Row) -> None:
        row.finished = True
        self._slots.working[row.place] = False


def _at_work(row: _Row | None) -> bool:
    return row is not None and not row.finished


def _unread(row: _Row) -> list[int]:
    """Return the request's tokens that the model has to read."""
    return row.request.token_ids[len(row.ids or ()) :]


def sample(
    logits: Float[Tensor, "B V"], temperatures: Float[Tensor, " B"], uniforms: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Return the next tokens and their log-probabilities; at temperature 0 the likeliest.

    A token is the inverse of the cumulative distribution at a uniform number.
    """
    greedy = temperatures == 0
    logprobs = (logits / temperatures.masked_fill(greedy, 1.0)[:, None]).log_softmax(-1)
    tokens = logits.argmax(-1)
    if not greedy.all():
        cumulative = logprobs.exp().cumsum(-1, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
        tokens = torch.where(greedy, tokens, drawn.clamp(max=logits.shape[-1] - 1))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Slots:
    """What a session knows of its slots, a row of each tensor a slot: the cache, and the tokens of the turn.

    `lengths` are tokens in the cache; `counts` and `limits` those that were and may be sampled.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        device = model.device
        self.cache, self._window = slot_cache(model.config)
        self._layers = [layer for layer in self.cache.layers if isinstance(layer, SlotLayer)]
        self.temperatures, self._logprobs = torch.zeros(0, device=device), torch.zeros(0, 0, device=device)
        self.working, self._uniforms = self.temperatures.bool(), self._logprobs.double()
        self.lengths, self.counts, self.limits, self.newest = (self.temperatures.long() for _ in range(4))
        self._tokens = self._logprobs.long()

    _VECTORS = ("lengths", "counts", "limits", "newest", "working", "temperatures")
    _TABLES = ("_uniforms", "_tokens", "_logprobs")

    def grow(self, slots: int, longest: int, written: int) -> None:
        """Have at least so many slots, with room for `longest` tokens each, `written` of them of a turn."""
        window, used = self._window, int(self.lengths.max()) + 1 if len(self.lengths) else 0
        more, wider = slots - len(self.working), written + 1 - self._tokens.shape[1]
        for name in self._VECTORS:
            setattr(self, name, pad(getattr(self, name), (0, max(0, more))))
        for name in self._TABLES:
            setattr(self, name, pad(getattr(self, name), (0, max(0, wider), 0, max(0, more))))
        if more > 0 or longest > window.room:
            window.slots = len(self.working)
            window.room = max(window.room, slot_room(longest))
            for layer in self._layers:
                layer.grow(used)

    def move(self, place: int, to: int) -> None:
        """Let what is in one slot be in another."""
        for name in (*self._VECTORS, *self._TABLES):
            tensor: Tensor = getattr(self, name)
            tensor[to] = tensor[place]
        self.working[place] = False
        for layer in self._layers:
            layer.move(place, to, int(self.lengths[to]))

    def begin(self, place: int, past: int, request: Request, sampling: Sampling) -> None:
        """Begin a turn in a slot whose first `past` tokens are in the cache."""
        self.lengths[place], self.counts[place], self.limits[place] = past, 0, request.max_new_tokens
        self.temperatures[place], self.working[place] = sampling.temperature, True
        if sampling.temperature > 0:
            drawn = np.random.default_rng(request.seed).random(request.max_new_tokens)
            self._uniforms[place, : request.max_new_tokens] = torch.from_numpy(drawn)

    def forward(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "B T"],
        places: Int[Tensor, " B"],
        fresh: bool = False,
        leading: bool = False,
    ) -> Float[Tensor, "B T H"]:
        """Put new tokens behind those of their slots and return the last hidden states.

        `ids` are padded on the right: what stands there is masked until a token takes its place. With `fresh`
        no slot has any tokens yet; with `leading` the places are the first ones.
        """
        lengths, window = self.lengths[places], self._window
        positions = lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        window.places, window.fresh, window.leading = places, fresh, leading
        window.columns = positions.clamp(max=window.room - 1)
        longest = ids.shape[1] if fresh else int(lengths.max()) + ids.shape[1]
        window.width = min(longest, window.room)  # beyond it is padding alone
        hidden_from = torch.arange(window.width, device=ids.device) > positions[:, None, :, None]
        mask = torch.zeros(hidden_from.shape, dtype=model.dtype, device=ids.device).masked_fill_(
            hidden_from, -math.inf
        )
        hidden: Tensor = model.base_model(
            input_ids=ids,
            attention_mask=mask,  # numbers: of truth values each layer would make them again
            position_ids=window.columns,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def next_uniforms(self, places: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        return self._uniforms[places, self.counts[places]]

    def append(
        self, places: Int[Tensor, " B"], tokens: Int[Tensor, " B"], logprobs: Float[Tensor, " B"]
    ) -> None:
        """Write a token behind those of the turn; slots that are not at work stay as they are."""
        counts = self.counts[places]
        self._tokens[places, counts], self._logprobs[places, counts] = tokens, logprobs
        self.newest[places] = tokens
        self.counts[places] = counts + self.working[places].long()

    def written(self, place: int) -> tuple[list[int], list[float]]:
        """Return the turn's tokens and their log-probabilities."""
        count = int(self.counts[place])
        return self._tokens[place, :count].tolist(), self._logprobs[place, :count].tolist()


@dataclass
class Window:
    """Where the next pass reads and writes in all layers: `slots` of `room` tokens each.

    New tokens go to `columns` [B, T] of the slots `places` [B]; the first `width` columns are attended to.
    """

    slots: int = 0
    room: int = 0
    width: int = 0
    fresh: bool = False
    leading: bool = False
    places: Tensor | None = None
    columns: Tensor | None = None


def slot_cache(config: PretrainedConfig) -> tuple[DynamicCache, Window]:
    """Return a cache of slots and the window through which it is used.

    It is for models whose layers all attend to everything (Qwen2, Llama). Raises ValueError for others.
    """
    cache, window = DynamicCache(config=config), Window()
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise ValueError("this model's layers need caches of other kinds than full attention")
    cache.layers = [SlotLayer(window) for _ in cache.layers]
    return cache, window


class SlotLayer(DynamicLayer):
    """Keys and values [slots, heads, room, head size] of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, window: Window) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._room(states) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens; return those that are attended to, [B, heads, width, head size]."""
        window = self._window
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert window.places is not None and window.columns is not None
        rows = window.places[:, None]
        self.keys[rows, :, window.columns] = key_states.transpose(1, 2)
        self.values[rows, :, window.columns] = value_states.transpose(1, 2)
        if window.fresh:
            return key_states, value_states
        chosen = slice(len(window.places)) if window.leading else window.places
        seen = (states[:, :, : window.width][chosen] for states in (self.keys, self.values))
        return next(seen), next(seen)

    def grow(self, used: int) -> None:
        """Take a buffer as large as the window says; of the old one the first `used` columns matter."""
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = self._room(old)
            new[: len(old), :, :used] = old[:, :, :used]
            setattr(self, name, new)

    def move(self, place: int, to: int, length: int) -> None:
        """Copy a slot's first `length` tokens into another slot."""
        for states in (self.keys, self.values) if self.is_initialized else ():
            states[to, :, :length] = states[place, :, :length]

    def _room(self, like: Tensor) -> Tensor:
        # zeros: what is masked must still be a number
        return like.new_zeros(self._window.slots, like.shape[1], self._window.room, like.shape[3])
