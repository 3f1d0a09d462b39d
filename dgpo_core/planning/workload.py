"""How much there is to do, and on what: questions, passages, lengths of episodes, and the machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path

import numpy as np

from dgpo_core.agent.episode import Owner
from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.params import Params
from dgpo_core.datasets.published import PASSAGES, TEST_QUESTIONS, TRAIN_QUESTIONS
from dgpo_core.errors import UserError
from dgpo_core.tables import read_table

PASSAGE_WORDS = 100.0  # of wiki-18, by its making
TOKENS_A_WORD = 1.4  # English in vocabularies of 30,000 and more
PASSAGE_BYTES = 680.0  # of wiki-18 with id and title as JSON, on average
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class EpisodeLengths:
    """Means of an episode, in tokens; `turns` are the model's generations. `source` says where they are from.

    `variation` is the standard deviation of the length relative to its mean, `spread` how much longer the
    longest turn of a batch is than the mean one.
    """

    prompt: float
    model: float
    environment: float
    turns: float
    source: str
    variation: float = 0.3
    spread: float = 2.0

    @property
    def total(self) -> float:
        return self.prompt + self.model + self.environment

    @property
    def square(self) -> float:
        """Mean of the squared length, for attention."""
        return self.total**2 * (1 + self.variation**2)


def assumed(protocol: ProtocolConfig, top_k: int) -> EpisodeLengths:
    """Assume what the paper's set-up suggests: two searches (its ARCap table: 1.6 to 2.6), 60 tokens a turn,
    and passages of 100 words, 150 tokens each, cut by `protocol`'s limits."""
    searches = min(2.0, float(protocol.max_turns))
    prompt = 180.0 if protocol.instruction == "paper" else 40.0
    environment = searches * (min(150.0 * top_k, protocol.max_information) + 10)
    model = (searches + 1) * min(60.0, protocol.max_new_tokens)
    room = max(0.0, protocol.max_context - prompt)
    scale = min(1.0, room / (environment + model)) if environment + model else 1.0
    source = f"assumed: {searches:g} searches an episode, {min(60, protocol.max_new_tokens)} tokens a turn"
    return EpisodeLengths(prompt, model * scale, environment * scale, searches + 1, source)


def first_measured(paths: Iterable[Path]) -> EpisodeLengths | None:
    """Count in the first of the tables of episodes that exists and has some; None where none has."""
    for path in paths:
        if not path.is_file() or not (table := read_table(path, ["owners", "generations"])).num_rows:
            continue
        owners = table["owners"].combine_chunks()
        offsets, flat = owners.offsets.to_numpy(), owners.flatten().to_numpy()
        lengths = np.diff(offsets)
        counts = np.bincount(flat, minlength=len(Owner)) / table.num_rows
        return EpisodeLengths(
            prompt=float(counts[Owner.PROMPT]),
            model=float(counts[Owner.MODEL]),
            environment=float(counts[Owner.ENVIRONMENT]),
            turns=float(np.mean(table["generations"].to_numpy())),
            source=f"measured: {table.num_rows} episodes of {path}",
            variation=float(np.std(lengths) / np.mean(lengths)),
        )
    return None


@dataclass(frozen=True)
class Workload:
    """`train` and `test`: questions of each set. `correct`: share of the teacher's episodes that are kept;
    `gated`: share of the student's whose gate is open under selective guidance. `sources` says where from."""

    train: dict[str, int]
    test: dict[str, int]
    passages: int
    words: float
    lengths: EpisodeLengths
    correct: float
    gated: float
    sources: dict[str, str]

    @property
    def teach(self) -> int:
        """Training questions in use."""
        return sum(self.train.values())


def expected_counts(params: Params) -> tuple[dict[str, int], dict[str, int], int]:
    """Return training and test questions of each set and passages, before any stage has run: the published
    ones, or the embedded world's, which serve as a guess of own ones too. Raises UserError for a set that is
    neither."""
    train, test, world = params.questions.train, params.questions.test, params.world.questions
    published = params.data.source != "files"
    known = [published and name in TEST_QUESTIONS for name in (*train, *test)]
    if all(known):
        trained = {name: TRAIN_QUESTIONS.get(name, 0) for name in train}
        return trained, {name: TEST_QUESTIONS[name] for name in test}, PASSAGES
    if any(known):
        raise UserError("questions: the sets are partly published ones and partly the embedded world's")
    tested = {name: world.hard if name == "hard" else world.test for name in test}
    return dict.fromkeys(train, world.train), tested, params.world.passages


@dataclass(frozen=True)
class Device:
    """`memory` in bytes; `flops` a second in dense bfloat16 and `bandwidth` of the memory in bytes a second,
    nan where unknown (then no hours can be told)."""

    name: str
    memory: float
    flops: float = nan
    bandwidth: float = nan


# Memory as nvidia-smi tells it; FLOPs (dense bfloat16, without sparsity) and bandwidth from the data sheets.
DEVICES = {
    name: Device(name, mebibytes * MIB, flops, bandwidth)
    for name, mebibytes, flops, bandwidth in (
        ("h200", 143_771, 989e12, 4.8e12),
        ("h100", 81_559, 989e12, 3.35e12),
        ("h100-pcie", 81_559, 756e12, 2.0e12),
        ("a100-80", 81_920, 312e12, 2.04e12),
        ("a100-40", 40_960, 312e12, 1.56e12),
        ("l40s", 46_068, 362e12, 0.864e12),
        ("a6000", 49_140, 155e12, 0.768e12),
        ("l4", 23_034, 121e12, 0.3e12),
        ("rtx4090", 24_564, 165e12, 1.01e12),
    )
}
PROCESSOR = Device("processor", inf)  # its memory is the host's; how fast it is differs too much


def device_of(text: str) -> Device:
    """Find a GPU by its name in the table, or make one of so many GiB. Raises UserError."""
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    try:
        memory = float(text) * GIB
    except ValueError:
        memory = nan
    if not 0 < memory < inf:  # nan is neither
        raise UserError(f"--gpu {text}: neither GiB of memory nor one of {', '.join(DEVICES)}")
    return Device(f"{text} GiB", memory)


@dataclass(frozen=True)
class Assumptions:
    """What an estimate of time rests on beside the data sheets.

    `efficiency`: share of the peak FLOPs in training and prefill; `decoding`: share of the bandwidth in
    decoding; `launch`: seconds that a decoding step waits for the host, for each layer in eager transformers,
    and `scheduling` in all in vLLM; `queries`: a second, that retriever and encoder answer together.
    """

    efficiency: float = 0.4
    decoding: float = 0.6
    launch: float = 0.001
    scheduling: float = 0.005
    queries: float = 500.0


@dataclass(frozen=True)
class Machine:
    """`gpus` devices; `memory` (bytes) of the host and `disk` (bytes, free), without end where not told;
    `price` of a GPU and hour in any currency, nan where not told. Without GPUs as many batches are under way
    at a time as the processor has `threads`."""

    gpus: int
    device: Device
    memory: float = inf
    disk: float = inf
    price: float = nan
    assumptions: Assumptions = Assumptions()
    threads: int = 1

    @property
    def batches(self) -> int:
        """Return how many batches a device works on at a time."""
        return 1 if self.gpus else self.threads
