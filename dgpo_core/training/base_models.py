"""Building the embedded student and teacher, phase by phase: reading, and for the teacher the protocol."""

import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dgpo_core.config.data import BaseModelsConfig, PhaseConfig
from dgpo_core.config.protocol import ProtocolConfig
from dgpo_core.datasets.world.expert import expert_examples
from dgpo_core.datasets.world.reading import SORTED_STEPS, Example, ReadingDrill
from dgpo_core.datasets.world.tokenizer import build_tokenizer
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.models import build_qwen2, save_model
from dgpo_core.training.pretrain import train_on_examples

Report = Callable[[str, int, int, dict[str, float]], None]  # phase, step, steps, metrics


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

    def build(self, folder: Path) -> None:
        """Write `folder`/student and `folder`/teacher."""
        config = self._config
        for name, shape, phases in (
            ("student", config.student, config.student_phases),
            ("teacher", config.teacher, config.teacher_phases),
        ):
            torch.manual_seed(config.seed)
            model = build_qwen2(shape, self._tokenizer)
            for number, phase in enumerate(phases):
                # the draws of a phase are those of the nth phase of its kind
                seed = config.seed + [p.kind for p in phases[:number]].count(phase.kind)
                self._train(model, f"{name}-{number}-{phase.kind}", seed, phase)
            save_model(model, self._tokenizer, folder / name)

    def _train(self, model: PreTrainedModel, name: str, seed: int, phase: PhaseConfig) -> None:
        train_on_examples(
            model,
            phase,
            self._reading(phase, seed) if phase.kind == "reading" else self._protocol_batches(phase, seed),
            Checkpoint(self._state / name),
            lambda step, metrics: self._report(name, step, phase.steps, metrics),
        )

    def _reading(self, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        return lambda step: self._drill.batch(seed, step, phase.batch_size, phase.passages(step))

    def _protocol_batches(self, phase: PhaseConfig, seed: int) -> Callable[[int], list[Example]]:
        examples = self._experts
        lengths = [len(example.ids) for example in examples]
        batches = _batches_by_length(lengths, phase.steps, phase.batch_size, seed)
        return lambda step: [examples[i] for i in batches[step]]

    @cached_property
    def _drill(self) -> ReadingDrill:
        return ReadingDrill(self._world, self._worlds, self._tokenizer)

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
