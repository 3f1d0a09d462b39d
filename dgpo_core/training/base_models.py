"""Building the embedded student and teacher: both learn to read, the teacher also learns the protocol."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from dgpo_core.config.data import BaseModelsConfig, ModelShape, ReadingConfig, WorldConfig
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
        world: WorldConfig,
        protocol: ProtocolConfig,
        top_k: int,
        state: Path,
        report: Report,
    ) -> None:
        self._config, self._world, self._protocol, self._top_k = config, world, protocol, top_k
        self._state, self._report = state, report
        self._tokenizer = build_tokenizer()
        self._worlds = range(config.first_world_seed, config.first_world_seed + config.worlds)

    def build(self, folder: Path) -> None:
        """Write `folder`/student and `folder`/teacher."""
        drill = ReadingDrill(self._world, self._worlds, self._tokenizer)
        student = self._reader("student", self._config.student, self._config.student_reading, drill)
        save_model(student, self._tokenizer, folder / "student")
        teacher = self._reader("teacher", self._config.teacher, self._config.teacher_reading, drill)
        self._teach_protocol(teacher)
        save_model(teacher, self._tokenizer, folder / "teacher")

    def _reader(
        self, name: str, shape: ModelShape, config: ReadingConfig, drill: ReadingDrill
    ) -> PreTrainedModel:
        torch.manual_seed(self._config.seed)
        model = build_qwen2(shape, self._tokenizer)
        phase = f"{name}-reading"
        train_on_examples(
            model,
            config,
            lambda step: drill.batch(self._config.seed, step, config.batch_size, config.passages(step)),
            Checkpoint(self._state / phase),
            lambda step, metrics: self._report(phase, step, config.steps, metrics),
        )
        return model

    def _teach_protocol(self, teacher: PreTrainedModel) -> None:
        config = self._config.teacher_protocol
        examples = self._expert_examples()
        lengths = [len(example.ids) for example in examples]
        batches = _batches_by_length(lengths, config.steps, config.batch_size, self._config.seed)
        train_on_examples(
            teacher,
            config,
            lambda step: [examples[i] for i in batches[step]],
            Checkpoint(self._state / "teacher-protocol"),
            lambda step, metrics: self._report("teacher-protocol", step, config.steps, metrics),
        )

    def _expert_examples(self) -> list[Example]:
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
