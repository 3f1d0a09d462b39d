"""Building one of the embedded base models, phase by phase: reading, and for a teacher the protocol."""

import random
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import torch

from dgpo_core.config.data import BaseModelsConfig, PhaseConfig
from dgpo_core.config.protocol import ProtocolConfig
from dgpo_core.datasets.world.expert import expert_examples
from dgpo_core.datasets.world.reading import SORTED_STEPS, Example, ReadingDrill
from dgpo_core.datasets.world.tokenizer import build_tokenizer
from dgpo_core.pretraining.loop import train_on_examples
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.models import build_model, save_model

# Examples in one pass: the attention of more fills the processor's caches, and is up to three times slower.
AT_A_TIME = {"reading": 16, "protocol": 4}

Report = Callable[[str, int, dict[str, float]], None]  # phase, its step, metrics


class BaseModelBuilder:
    """Builds from a seed; every phase keeps its progress under `state`, so a killed build continues."""

    def __init__(
        self,
        config: BaseModelsConfig,
        protocol: ProtocolConfig,
        top_k: int,
        state: Path,
        report: Report,
    ) -> None:
        self._config, self._world, self._protocol, self._top_k = config, config.world, protocol, top_k
        self._state, self._report = state, report
        self._tokenizer = build_tokenizer()
        self._worlds = range(config.first_world_seed, config.first_world_seed + config.worlds)

    def build(self, name: str, folder: Path) -> None:
        """Write model `name` of the configuration to `folder`.

        With one thread, so that the number of the machine's cores does not show in the weights; models so
        small gain more from being built side by side.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            plan = self._config.models[name]
            torch.manual_seed(self._config.seed)
            model = build_model(plan.shape, self._tokenizer)
            model.set_attn_implementation("eager")  # for short texts on a CPU its backward is twice as fast
            drill = ReadingDrill(self._world, self._worlds, self._tokenizer)
            for number, phase in enumerate(plan.phases):
                # the draws of a phase are those of the nth phase of its kind
                seed = self._config.seed + [p.kind for p in plan.phases[:number]].count(phase.kind)
                reads, label = phase.kind == "reading", f"{number}-{phase.kind}"
                batch = self._reading(drill, phase, seed) if reads else self._protocol_batches(phase, seed)
                checkpoint, report = Checkpoint(self._state / label), partial(self._report, label)
                train_on_examples(
                    model, phase, batch, checkpoint, report, AT_A_TIME[phase.kind], plan.precision
                )
            save_model(model, self._tokenizer, folder)
        finally:
            torch.set_num_threads(threads)

    def _reading(self, drill: ReadingDrill, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        return lambda step: drill.batch(seed, step, phase.batch_size, phase.passages(step))

    def _protocol_batches(self, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        examples = self._experts
        lengths = [len(example.ids) for example in examples]
        batches = _batches_by_length(lengths, phase.steps, phase.batch_size, seed)
        return lambda step: [examples[i] for i in batches[step]]

    @cached_property
    def _experts(self) -> list[Example]:
        each = self._config.expert_episodes // self._config.worlds
        return [
            example
            for seed in self._worlds
            for example in expert_examples(
                self._world, seed, each, self._tokenizer, self._protocol, self._top_k
            )
        ]


def _batches_by_length(lengths: list[int], steps: int, size: int, seed: int) -> list[list[int]]:
    """Indices of each step's examples: shuffled epochs, in which neighbours are put together by length.

    As in the reading drill, SORTED_STEPS steps share a draw that is cut by length, so that little is padding.
    """
    rng = random.Random(f"base-models-{seed}")
    order: list[int] = []
    while len(order) < (steps + SORTED_STEPS) * size:
        epoch = list(range(len(lengths)))
        rng.shuffle(epoch)
        order += epoch
    batches = []
    for start in range(0, steps * size, SORTED_STEPS * size):
        group = sorted(order[start : start + SORTED_STEPS * size], key=lambda i: lengths[i])
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches[:steps]
