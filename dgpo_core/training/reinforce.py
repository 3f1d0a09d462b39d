"""DGPO and its relatives: PPO in which the gate decides who is pulled towards the reference (eqs. 2-4)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.config.training import ComputeConfig, Recipe, ReinforceConfig
from dgpo_core.protocol.episode import Episode, Outcome
from dgpo_core.training import optimizer as optim
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.critic import Critic
from dgpo_core.training.experience import Experience, ExperienceMaker, training_metrics
from dgpo_core.training.update import Updater

Metrics = dict[str, float]
Rollout = Callable[[list[int], int], list[Episode]]  # (indices of questions, step) -> episodes


def question_order(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of a step's questions: epochs of shuffled questions laid end to end."""
    places = [divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: _shuffled(count, epoch, seed) for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][offset] for epoch, offset in places]


def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"reinforce-{seed}-{epoch}").shuffle(order)
    return order


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen."""

    student: PreTrainedModel
    reference: PreTrainedModel | None
    recipe: Recipe
    config: ReinforceConfig
    compute: ComputeConfig
    seed: int

    def train(
        self,
        questions: int,
        rollout: Rollout,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, int, Metrics], None],
    ) -> list[Metrics]:
        """Rows of metrics, one a step. Resumes from the checkpoint exactly."""
        config = self.config
        torch.manual_seed(self.seed)
        critic = Critic(self.student)
        actor = self._stepper(self.student, config.actor_learning_rate, config.actor_warmup)
        critic_stepper = self._stepper(critic, config.critic_learning_rate, config.critic_warmup)
        parts: dict[str, Any] = {
            "student": self.student,
            "critic": critic,
            "actor": actor,
            "critic_stepper": critic_stepper,
        }
        rows: list[Metrics] = []
        if state := checkpoint.load():
            rows = state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        maker = ExperienceMaker(self.student, self.reference, critic, self.recipe, config, self.compute)
        updater = Updater(self.student, critic, actor, critic_stepper, config, self.compute)
        for step in range(len(rows), config.steps):
            chosen = question_order(questions, config.batch_size, step, self.seed)
            row = self._step(rollout(chosen, step), maker, updater, step)
            if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                row["dev_em"] = evaluate()
            rows.append({"step": step + 1, **row})
            report(step + 1, config.steps, row)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoint.save({"rows": rows, **{name: part.state_dict() for name, part in parts.items()}})
        return rows

    def _stepper(self, module: torch.nn.Module, learning_rate: float, warmup: float) -> optim.Stepper:
        config = self.config
        updates = config.steps * (config.batch_size // config.mini_batch_size)
        return optim.Stepper(
            optim.adamw(list(module.parameters()), learning_rate, config.weight_decay),
            schedule=optim.constant(math.ceil(warmup * updates)),
            max_grad_norm=config.max_grad_norm,
        )

    def _step(self, episodes: list[Episode], maker: ExperienceMaker, updater: Updater, step: int) -> Metrics:
        usable = [e for e in episodes if e.outcome is not Outcome.FAILED and e.model_tokens]
        row: Metrics = {"failed": float(sum(e.outcome is Outcome.FAILED for e in episodes))}
        if not usable:  # nothing to learn from: the retriever was down for a whole step
            return row
        experience: Experience = maker.make(usable)
        row |= training_metrics(usable, experience)
        order = list(range(len(usable)))
        random.Random(f"mini-{self.seed}-{step}").shuffle(order)
        row |= updater.update(experience, order)
        return row
