"""Building the embedded student and teacher: both learn to read, the teacher also learns the protocol."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.data import BaseModelsConfig, ModelShape, ReadingConfig, WorldConfig
from dgpo_core.config.protocol import ProtocolConfig
from dgpo_core.datasets.world.expert import expert_examples
from dgpo_core.datasets.world.reading import Example, ReadingDrill
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
        self._tokenizer: PreTrainedTokenizerFast = build_tokenizer()
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
        order = _endless_order(len(examples), config.steps * config.batch_size, self._config.seed)
        train_on_examples(
            teacher,
            config,
            lambda step: [
                examples[i] for i in order[step * config.batch_size : (step + 1) * config.batch_size]
            ],
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


def _endless_order(count: int, length: int, seed: int) -> list[int]:
    """Indices of shuffled epochs, at least `length` of them."""
    rng = random.Random(f"base-models-{seed}")
    order: list[int] = []
    while len(order) < length:
        epoch = list(range(count))
        rng.shuffle(epoch)
        order += epoch
    return order
