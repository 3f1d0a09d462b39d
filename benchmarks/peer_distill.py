"""Distillation with a live teacher beside TRL's: KD by DistillationTrainer, GKD by GKDTrainer.

TRL's trainers have no cross-entropy beside the divergence, so its weight is 0 here.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.updates import (
    ARGUMENTS,
    STUDENT,
    TEACHER,
    Comparison,
    OurUpdate,
    TrlLoss,
    pad_right,
    scratch,
    trl_batches,
)
from dgpo_core.agent.episode import Episode, Owner
from dgpo_core.config.params import load_params
from dgpo_core.config.recipes import Distillation
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes


def ours(objective: str, episodes: list[Episode]) -> OurUpdate:
    """Return our side."""
    params, model = load_params(), load_model(STUDENT)
    config = params.distill.model_copy(update={"ce_weight": 0.0})
    recipe = Distillation.model_validate({"start": "student", "objective": objective})
    source = TeacherEpisodes(episodes, config, 0)
    distiller = Distiller(model, load_model(TEACHER), recipe, config, params.compute, source)
    sequences = [distiller._sequence(episode) for episode in episodes]
    return OurUpdate(
        [model],
        lambda: distiller._averages(sequences),
        lambda: distiller._learn(episodes, 0),
    )


class DistillationUpdate(TrlLoss):
    """KD by TRL."""

    def __init__(self, episodes: list[Episode], rows: int) -> None:
        from trl import DistillationConfig, DistillationTrainer

        model = load_model(STUDENT)
        super().__init__(model, trl_batches(episodes, rows), load_params().distill)
        arguments = DistillationConfig(output_dir=scratch(), beta=0.0, **ARGUMENTS)
        self._trainer = DistillationTrainer(
            model=model,
            teacher_model=load_model(TEACHER),
            args=arguments,
            train_dataset=_dataset(),
            processing_class=load_tokenizer(STUDENT),
        )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        loss: Tensor = self._trainer.compute_loss(self.model, batch)
        return loss


class GkdUpdate(TrlLoss):
    """GKD by TRL, reverse KL."""

    def __init__(self, episodes: list[Episode], rows: int) -> None:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        model, batches = load_model(STUDENT), []
        for start in range(0, len(episodes), rows):
            chosen = episodes[start : start + rows]
            ids = [torch.tensor(episode.token_ids) for episode in chosen]
            own = [torch.tensor(episode.owners) == Owner.MODEL for episode in chosen]
            labels = [row.masked_fill(~counts, -100) for row, counts in zip(ids, own, strict=True)]
            mask = [torch.ones_like(row) for row in ids]
            batches.append(
                {
                    "input_ids": pad_right(ids),
                    "attention_mask": pad_right(mask),
                    "labels": pad_right(labels, -100),
                }
            )
        self._tokens = sum(episode.model_tokens for episode in episodes)
        super().__init__(model, batches, load_params().distill)
        self._trainer = GKDTrainer(
            model=model,
            teacher_model=load_model(TEACHER),
            args=GKDConfig(output_dir=scratch(), beta=1.0, lmbda=0.0, **ARGUMENTS),
            train_dataset=_dataset(),
            processing_class=load_tokenizer(STUDENT),
        )

    def loss(self, batch: dict[str, Any]) -> Tensor:
        loss: Tensor = self._trainer.compute_loss(self.model, batch, num_items_in_batch=self._tokens)
        return loss


def _dataset() -> Any:
    """Return what TRL's trainers need to be made, and never read here."""
    from datasets import Dataset

    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    return Dataset.from_list([{"prompt": turns[:1], "messages": turns}] * 2)


KD = Comparison("DistillationTrainer", partial(ours, "kd"), DistillationUpdate)
GKD = Comparison("GKDTrainer", partial(ours, "reverse_kl"), GkdUpdate)
