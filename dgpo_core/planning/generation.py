"""Episodes through an engine: FLOPs, time and memory of prefill and decoding (formulas in `passes`)."""

from dataclasses import dataclass

from dgpo_core.config.params import Params
from dgpo_core.planning import passes
from dgpo_core.planning.architectures import Architecture
from dgpo_core.planning.episodes import EpisodeLengths
from dgpo_core.planning.machine import Machine, computing

VLLM_ROWS = 256.0  # sequences that vLLM decodes side by side
VLLM_TOKENS = 8192.0  # tokens that it reads in one pass
Parts = dict[str, float]


@dataclass(frozen=True)
class Generation:
    """Episodes generated: tokens through the model, FLOPs, seconds on one device, and of retrieval
    besides."""

    tokens: float
    flops: float
    seconds: float | None
    memory: Parts
    searching: float


@dataclass(frozen=True)
class Generator:
    """What generates: `engine` is one of rollout.engine."""

    params: Params
    lengths: EpisodeLengths
    machine: Machine
    engine: str

    @property
    def vllm(self) -> bool:
        return self.engine != "transformers"

    def generate(
        self,
        shape: Architecture,
        episodes: float,
        lengths: EpisodeLengths | None = None,
        together: float = float("inf"),
        chunk: float = float("inf"),
    ) -> Generation:
        """Episodes through the engine: prefill of what is new in each turn, then a decoding step a token.

        `together`: episodes that are under way at a time on one device, as in a step of reinforcement
        learning, whose end waits for the longest. vLLM keeps the prefixes of earlier turns, and its batches
        stay full while there is more to do. transformers keeps those of `rollout.kept_tokens`, out of `chunk`
        episodes that it is asked for at a time, and reads the history of others again.
        """
        lengths = lengths or self.lengths
        vllm, precision = self.vllm, self.params.rollout.precision
        width = 4 if vllm else passes.CACHE_WIDTH[precision]
        under_way = max(1.0, min(episodes, together, chunk)) * lengths.total
        kept = 0.0 if vllm else min(float(self.params.rollout.kept_tokens), under_way)
        again = 0.0 if vllm else 1 - kept / under_way  # share of the history that is read again
        new, written = lengths.total - lengths.model, lengths.model
        prefill = new + again * max(0.0, lengths.prefill - new)
        pairs = lengths.square * (1 + again * max(0.0, lengths.turns / 2 - 1))
        reading = passes.forward_flops(shape, prefill, pairs)
        writing = passes.forward_flops(shape, written, 0) + passes.head_flops(shape, written)
        room = lengths.total + (0 if vllm else self.params.protocol.max_new_tokens)
        fitting = VLLM_ROWS if vllm else max(1.0, self.params.rollout.batch_tokens / room)
        rows = min(fitting, max(1.0, together))
        at_once = VLLM_TOKENS if vllm else rows * room
        memory = {
            "key-value cache": passes.cache_bytes(shape, rows * room + kept, width),
            "activations of generation": passes.passing_bytes(shape, at_once, precision),
            # of sampling: float32 and float64, twice each
            "logits of generation": 24.0 * rows * shape.vocabulary,
        }
        full = vllm and together == float("inf")
        steps = episodes / rows * written * (1 if full else lengths.spread)
        cached = passes.cache_bytes(shape, rows * lengths.total / 2, width)
        step, read = self._decoding(shape, rows, cached, vllm), computing(self.machine, reading * episodes)
        seconds = None if step is None or read is None else read + steps * step
        return Generation(
            episodes * (prefill + written),
            episodes * (reading + writing),
            seconds,
            memory,
            self._searching(episodes, lengths),
        )

    def _searching(self, episodes: float, lengths: EpisodeLengths) -> float:
        """Seconds for which retrieval is waited for: a search a turn but the last, shared by all devices."""
        return episodes * max(0.0, lengths.turns - 1) / self.machine.assumptions.queries

    def _decoding(self, shape: Architecture, rows: float, cached: float, vllm: bool) -> float | None:
        """Seconds of one step for `rows` sequences: it reads all weights and the batch's cache, so it takes
        as long as the memory needs, or the matrices where the batch is large (Pope et al. 2022,
        arXiv:2211.05102), and what the host needs to start it."""
        device, assumed = self.machine.device, self.machine.assumptions
        if device.bandwidth is None or device.flops is None:
            return None
        width = 2 if self.params.rollout.precision == "bfloat16" else 4
        weights = shape.matrices + shape.vocabulary * shape.hidden
        reading = (width * weights + cached) / (device.bandwidth * assumed.decoding)
        multiplying = 2 * rows * weights / (device.flops * assumed.efficiency)
        return max(reading, multiplying) + (assumed.scheduling if vllm else assumed.launch * shape.layers)


def shared(seconds: float | None, devices: int) -> float | None:
    return None if seconds is None else seconds / max(1, devices)


def added(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
