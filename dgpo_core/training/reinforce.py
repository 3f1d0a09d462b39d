"""DGPO and its relatives: PPO in which the gate decides who is pulled towards the reference (eqs. 2-4)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.protocol.episode import Episode
from dgpo_core.training import optimizer as optim
from dgpo_core.training.batches import check_ids, shared_ids
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.critic import Critic
from dgpo_core.training.engines import FrozenModel, Optimization, training_engine
from dgpo_core.training.episode_sources import Rollout, question_order, usable
from dgpo_core.training.experience import Experience, ExperienceMaker, training_metrics
from dgpo_core.training.finite import require_finite, training_step
from dgpo_core.training.token_model import TokenModel
from dgpo_core.training.update import Updater

Metrics = dict[str, float]

# Training stops when one of these is no number; causes first, as the first one says what to lower.
WATCHED = ["kl_inside", "kl_outside", "reward", "value_loss", "critic_grad_norm", "policy_loss", "entropy"]
WATCHED += ["approx_kl", "actor_grad_norm"]


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen.

    Distributions are over the ids that the tokenizer knows, the first `known`, as far as both models have
    rows for them; None: all of these rows.
    """

    student: PreTrainedModel
    reference: PreTrainedModel | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    seed: int
    known: int | None = None

    def __post_init__(self) -> None:
        self.vocabulary = shared_ids(self.known, self.student, self.reference)

    def train(
        self,
        questions: int,
        rollout: Rollout,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Rows of metrics, one a step. Resumes from the checkpoint exactly.

        `report` is given the number of steps and the rows so far. Raises NotFinite at the first step that
        gives no numbers; the checkpoint is then the last one before it.
        """
        config = self.config
        torch.manual_seed(self.seed)
        critic = None
        if self.recipe.algorithm == "ppo":  # made of the student while its weights are whole
            how = self._optimization(config.critic_learning_rate, config.critic_learning_rate_warmup)
            critic = training_engine(Critic(self.student), how, self.compute, published=False)
        how = self._optimization(config.actor_learning_rate, config.actor_learning_rate_warmup)
        actor = training_engine(TokenModel(self.student, self.vocabulary), how, self.compute)
        reference = None
        if self.reference is not None:
            reference = FrozenModel(self.reference, self.compute, self.vocabulary)
        parts: dict[str, Any] = {"actor": actor}
        if critic is not None:
            parts["critic"] = critic
        rows: list[Metrics] = []
        if state := checkpoint.load():
            rows = state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        maker = ExperienceMaker(actor, reference, critic, self.recipe, config, self.compute)
        updater = Updater(actor, critic, config, self.compute)
        actor.publish()
        for step in range(len(rows), config.steps):
            with training_step(step + 1, self._rate_behind):
                row = self._step(rollout(self._questions(questions, step), step), maker, updater, step)
                actor.publish()
                if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                    row["dev_em"] = evaluate()
            rows.append({"step": step + 1, **row})
            report(config.steps, rows)
            if (step + 1) % config.checkpoint_every == 0:
                checkpoint.save({"rows": rows, **{name: part.state_dict() for name, part in parts.items()}})
        actor.finish()
        return rows

    def _rate_behind(self, quantity: str) -> str:
        """Return the setting that a quantity which is no number asks to lower."""
        part = "critic" if quantity in ("value_loss", "critic_grad_norm") else "actor"
        return f"reinforce.{part}_learning_rate (now {getattr(self.config, f'{part}_learning_rate'):g})"

    def _optimization(self, learning_rate: float, warmup: float) -> Optimization:
        config = self.config
        updates = config.steps * (config.batch_size // config.mini_batch_size)
        schedule = optim.constant(math.ceil(warmup * updates))
        return Optimization(learning_rate, config.weight_decay, config.max_grad_norm, schedule)

    def _questions(self, count: int, step: int) -> list[int]:
        """Indices of a step's questions; under GRPO each as often as its group has episodes."""
        config = self.config
        group = config.group_size if self.recipe.algorithm == "grpo" else 1
        chosen = question_order(count, config.batch_size // group, step, self.seed)
        return [question for question in chosen for _ in range(group)]

    def _step(self, episodes: list[Episode], maker: ExperienceMaker, updater: Updater, step: int) -> Metrics:
        learned = usable(episodes)
        row: Metrics = {"gate_excluded": 1 - len(learned) / len(episodes)}
        if not learned:  # not one token of the student, where prompts leave it no room
            return row
        check_ids(learned, self.vocabulary)
        experience: Experience = maker.make(learned)
        row["gate_open"] = sum(experience.gated) / len(episodes)
        row["gate_closed"] = 1 - row["gate_open"] - row["gate_excluded"]
        row |= training_metrics(learned, experience)
        row["unrewarded"] = float(not any(episode.correct for episode in learned))
        order = list(range(len(learned)))
        random.Random(f"mini-{self.seed}-{step}").shuffle(order)
        _require_numbers(row)  # before weights are changed by it
        row |= updater.update(experience, order)
        _require_numbers(row)
        return row


def _require_numbers(row: Metrics) -> None:
    """Raise NotFinite for a watched metric that is nan or infinite."""
    require_finite({name: row[name] for name in WATCHED if name in row})
