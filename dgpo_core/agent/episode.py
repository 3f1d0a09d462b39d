"""The record of an episode, its turns, and its table on disk (Parquet)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dgpo_core.errors import UserError, first_line
from dgpo_core.tables import read_table

Decode = Callable[[list[int]], Any]  # a tokenizer's `decode`: token ids -> text (typed for batches too)


class Owner(IntEnum):
    """The writer of a token."""

    PROMPT = 0
    MODEL = 1
    ENVIRONMENT = 2


class Outcome(StrEnum):
    """`failed` is an infrastructure failure: neither right nor wrong, kept out of every average."""

    CORRECT = "correct"
    WRONG = "wrong"
    FAILED = "failed"


class Ending(StrEnum):
    """The reason why an episode ended."""

    ANSWERED = "answered"
    BUDGET = "budget"  # no turn left
    LENGTH = "length"  # no room left in the context
    FAILURE = "failure"  # retriever or engine


@dataclass(frozen=True)
class Turn:
    """One generation of the model, as places in the episode's tokens, and the environment's reply to it.

    The model wrote the tokens from `start` up to `end`, the environment those from `end` up to `reply_end`;
    the two are equal where no reply follows.
    """

    start: int
    end: int
    reply_end: int


@dataclass
class Search:
    """One answered query; scores are the index's, in the order shown to the model.

    `hit`: a golden answer is contained in one of the passages.
    """

    query: str
    passage_ids: list[str]
    scores: list[float]
    hit: bool = False


@dataclass
class Episode:
    """One episode, token by token.

    `token_ids`, `owners` and `logprobs` have one entry a token, prompt first; log-probabilities (nats, of
    the sampling policy at its temperature) are 0 where the owner is not the model. `response` is the text
    after the prompt, for people; it is never tokenised again.
    """

    question_id: str
    dataset: str
    question: str
    golden_answers: list[str]
    sample: int  # which episode of the same question (GRPO groups)
    token_ids: list[int]
    owners: list[int]
    logprobs: list[float]
    response: str
    prediction: str | None
    outcome: Outcome
    ending: Ending
    well_formed: bool
    hit: bool  # of any of the searches
    generations: int
    invalid_actions: int
    cut_turns: int  # turns that ran into the limit of new tokens
    searches: list[Search] = field(default_factory=list)
    failure: str | None = None

    @property
    def correct(self) -> bool:
        return self.outcome is Outcome.CORRECT

    @property
    def model_tokens(self) -> int:
        return sum(owner == Owner.MODEL for owner in self.owners)

    @property
    def turns(self) -> list[Turn]:
        starts, ends = model_runs(self.owners)
        reply_ends = [*starts[1:], len(self.owners)]
        return [Turn(*map(int, places)) for places in zip(starts, ends, reply_ends, strict=False)]

    def turn_texts(self, decode: Decode) -> list[str]:
        """Return what the model wrote in each turn; text of the environment is never in it."""
        return [decode(self.token_ids[turn.start : turn.end]) for turn in self.turns]


def nothing_new(searches: "Sequence[Search]") -> list[bool]:
    """Return of each search whether it brought no passage that an earlier one had not."""
    found = [set(search.passage_ids) for search in searches]
    return [own <= set().union(*found[:i]) for i, own in enumerate(found)]


def model_runs(owners: "Sequence[int] | np.ndarray") -> tuple[np.ndarray, np.ndarray]:
    """Return where each run of the model's tokens begins, and where it has ended: int64, one entry a run.

    `owners` may be those of several episodes in a row, because each of them begins with its prompt.
    """
    own = np.concatenate([[False], np.asarray(owners) == Owner.MODEL, [False]])
    changes = np.flatnonzero(own[1:] != own[:-1])
    return changes[::2], changes[1::2]


_TEXT, _TEXTS, _FLOATS = pa.string(), pa.list_(pa.string()), pa.list_(pa.float32())
_SEARCH = pa.struct([("query", _TEXT), ("passage_ids", _TEXTS), ("scores", _FLOATS), ("hit", pa.bool_())])
SCHEMA = pa.schema(
    [
        ("question_id", _TEXT),
        ("dataset", _TEXT),
        ("question", _TEXT),
        ("golden_answers", _TEXTS),
        ("sample", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("owners", pa.list_(pa.int8())),
        ("logprobs", _FLOATS),
        ("response", _TEXT),
        ("prediction", _TEXT),
        ("outcome", _TEXT),
        ("ending", _TEXT),
        ("well_formed", pa.bool_()),
        ("hit", pa.bool_()),
        ("generations", pa.int32()),
        ("invalid_actions", pa.int32()),
        ("cut_turns", pa.int32()),
        ("searches", pa.list_(_SEARCH)),
        ("failure", _TEXT),
    ]
)


def write_episodes(path: Path, episodes: list[Episode], metadata: dict[str, str] | None = None) -> None:
    """Write a table; `metadata` (tokenizer fingerprint, index digest) goes into the file's schema."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not dataclasses.asdict: it copies every token
    rows = [
        vars(episode) | {"searches": [vars(search) for search in episode.searches]} for episode in episodes
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pq.write_table(table.replace_schema_metadata(metadata or {}), path, compression="zstd")


def read_episodes(path: Path) -> list[Episode]:
    """Read a table. Raises UserError when the file is missing or is no table of episodes."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with _readable(path):
        table = read_table(path)
    if missing := set(SCHEMA.names) - set(table.column_names):
        raise UserError(f"{path}: no table of episodes, lacks the columns {sorted(missing)}")
    if wrong := [name for name in SCHEMA.names if table.schema.field(name).type != SCHEMA.field(name).type]:
        raise UserError(f"{path}: no table of episodes, the columns {wrong} have other types")
    try:
        return [_episode(row) for row in table.select(SCHEMA.names).to_pylist()]
    except (ValueError, TypeError) as error:  # an outcome or ending that there is not, or nothing
        raise UserError(f"{path}: not an episode: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata that `write_episodes` was given. Raises UserError as `read_episodes` does."""
    with _readable(path):
        raw = pq.read_schema(path).metadata or {}
        return {key.decode(): value.decode() for key, value in raw.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise UserError for what pyarrow says of a damaged file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a Parquet file of episodes: {first_line(error)}") from error


def _episode(row: dict) -> Episode:  # type: ignore[type-arg]
    row["outcome"], row["ending"] = Outcome(row["outcome"]), Ending(row["ending"])
    row["searches"] = [Search(**search) for search in row["searches"]]
    return Episode(**row)
