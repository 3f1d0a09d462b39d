"""How long episodes are: counted in those of an earlier run, or assumed."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dgpo_core.agent.episode import Owner, model_runs
from dgpo_core.config.agent import ProtocolConfig

SPREAD = 2.0  # tokens of the longest turn of a batch to those of the mean, where nothing was measured


@dataclass(frozen=True)
class EpisodeLengths:
    """Means of an episode, in tokens; `turns` are the model's generations. `source` says where they are from.

    `square` is the mean of the squared length (for attention), `spread` how much longer the longest turn of a
    batch is than the mean one, `histories` the sum of what stands before each turn, where it was counted.
    """

    prompt: float
    model: float
    environment: float
    turns: float
    source: str
    variation: float = 0.3  # standard deviation of the length, relative to its mean
    spread: float = SPREAD
    histories: float | None = None

    @property
    def total(self) -> float:
        return self.prompt + self.model + self.environment

    @property
    def square(self) -> float:
        return self.total**2 * (1 + self.variation**2)

    @property
    def prefill(self) -> float:
        """Tokens that an engine without a prefix cache reads: the history before each of the turns."""
        if self.histories is not None:
            return self.histories
        n = self.turns
        retrieved = self.environment * (n / 2 if n > 1 else 1)  # with one turn it was given beforehand
        return n * self.prompt + (n - 1) * self.model / 2 + retrieved


def assumed(protocol: ProtocolConfig, top_k: int) -> EpisodeLengths:
    """What the paper's set-up suggests: two searches (its ARCap table: 1.6 to 2.6), 60 tokens a turn, and
    passages of 100 words, 150 tokens each, cut by `protocol`'s limits."""
    searches = min(2.0, float(protocol.max_turns))
    prompt = 180.0 if protocol.instruction == "paper" else 40.0
    environment = searches * (min(150.0 * top_k, protocol.max_information) + 10)
    model = (searches + 1) * min(60.0, protocol.max_new_tokens)
    room = max(0.0, protocol.max_context - prompt)
    scale = min(1.0, room / (environment + model)) if environment + model else 1.0
    source = f"assumed: {searches:g} searches an episode, {min(60, protocol.max_new_tokens)} tokens a turn"
    return EpisodeLengths(prompt, model * scale, environment * scale, searches + 1, source)


def measured(path: Path) -> EpisodeLengths | None:
    """Counted in a table of episodes; None where there is none."""
    if not path.is_file():
        return None
    table = pq.read_table(path, columns=["owners", "generations"])
    if not table.num_rows:
        return None
    owners = table["owners"].combine_chunks()
    offsets, flat = owners.offsets.to_numpy(), owners.flatten().to_numpy()
    lengths = np.diff(offsets)
    counts = np.bincount(flat, minlength=len(Owner)) / table.num_rows
    places = np.arange(len(flat)) - np.repeat(offsets[:-1], lengths)
    turns = float(np.mean(table["generations"].to_numpy()))
    return EpisodeLengths(
        prompt=float(counts[Owner.PROMPT]),
        model=float(counts[Owner.MODEL]),
        environment=float(counts[Owner.ENVIRONMENT]),
        turns=turns,
        source=f"measured: {table.num_rows} episodes of {path}",
        variation=float(np.std(lengths) / np.mean(lengths)),
        histories=float(places[model_runs(flat)[0]].sum()) / table.num_rows,
    )


def first_measured(paths: Iterable[Path]) -> EpisodeLengths | None:
    return next((found for path in paths if (found := measured(path))), None)
