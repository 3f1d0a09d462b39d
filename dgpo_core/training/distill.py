"""KD cold start: the student learns the teacher's distributions on its correct episodes (eq. 1)."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig, DistillConfig
from dgpo_core.errors import UserError
from dgpo_core.objectives.logprobs import distillation_terms
from dgpo_core.protocol.episode import Episode
from dgpo_core.training import optimizer as optim
from dgpo_core.training.batches import (
    Sequence,
    backbone_of,
    collate,
    counted_hidden,
    head_of,
    micro_batches,
    model_sequence,
)
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.compute import autocast

Metrics = dict[str, float]


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Raises UserError when the two tokenizers give an id different strings (method.md, section 3)."""
    first, second = ({i: token for token, i in t.get_vocab().items()} for t in (student, teacher))
    wrong = min((i for i in first.keys() & second.keys() if first[i] != second[i]), default=None)
    if wrong is not None:
        raise UserError(
            "models: student and teacher have different tokenizers, "
            "so their distributions cannot be compared; "
            f"the first difference is id {wrong}: {first[wrong]!r} against {second[wrong]!r}"
        )


def batch_order(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of every batch: a new shuffle each epoch, and no example left out."""
    batches = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"distill-{seed}-{epoch}").shuffle(order)
        batches += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches


@dataclass
class Distiller:
    """Trains `student` in place; `report` gets one row a step, `evaluate` measures validation EM."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    config: DistillConfig
    compute: ComputeConfig
    seed: int

    def train(
        self,
        episodes: list[Episode],
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, int, Metrics], None],
    ) -> list[Metrics]:
        """Rows of metrics, one a step; `dev_em` is in the last row of each epoch. Resumes if it can."""
        sequences = [model_sequence(episode) for episode in episodes]
        batches = batch_order(len(sequences), self.config.batch_size, self.config.epochs, self.seed)
        per_epoch = len(batches) // self.config.epochs
        config = self.config
        stepper = optim.Stepper(
            optim.adamw(list(self.student.parameters()), config.learning_rate, config.weight_decay),
            schedule=optim.cosine(len(batches), config.warmup_steps),
            max_grad_norm=config.max_grad_norm,
        )
        rows: list[Metrics] = []
        if state := checkpoint.load():
            self.student.load_state_dict(state["model"])
            stepper.load_state_dict(state["stepper"])
            rows = state["rows"]
        for step in range(len(rows), len(batches)):
            row = self._accumulate([sequences[i] for i in batches[step]])
            row["learning_rate"] = stepper.learning_rate
            row["grad_norm"] = stepper.step()
            epoch_done = (step + 1) % per_epoch == 0
            if epoch_done:
                row["dev_em"] = evaluate()
            rows.append({"step": step + 1, **row})
            report(step + 1, len(batches), row)
            if epoch_done:
                checkpoint.save(
                    {
                        "model": self.student.state_dict(),
                        "stepper": stepper.state_dict(),
                        "rows": rows,
                    }
                )
        return rows

    def _accumulate(self, sequences: list[Sequence]) -> Metrics:
        """Gradient of one batch; the losses are averages over its model tokens, however it is cut."""
        tokens = sum(len(sequence.positions) for sequence in sequences)
        totals = {"loss": 0.0, "ce": 0.0, "kl": 0.0}
        lengths = [len(sequence.ids) for sequence in sequences]
        for part in micro_batches(lengths, self.compute.micro_batch_tokens):
            batch = collate([sequences[i] for i in part], self.student.device)
            with autocast(self.compute):
                with torch.no_grad():
                    teacher_hidden = counted_hidden(backbone_of(self.teacher), batch)
                hidden = counted_hidden(backbone_of(self.student), batch)
                cross_entropy, kl = distillation_terms(
                    hidden, head_of(self.student), teacher_hidden, head_of(self.teacher), batch.targets
                )
            ce, kl_mean = cross_entropy.sum() / tokens, kl.sum() / tokens
            loss = self.config.ce_weight * ce + self.config.kl_weight * kl_mean
            loss.backward()
            for key, value in (("loss", loss), ("ce", ce), ("kl", kl_mean)):
                totals[key] += value.item()
        return totals
