"""DGPO and its relatives: PPO, GRPO or REINFORCE in which a gate opens to a reference's pull (eqs. 2-4).

`Reinforcer.train` repeats one step (docs/method.md, "Equations"):

(1) roll out: the student answers the step's questions, searching as it likes;
(2) log-probabilities of what it wrote under the student, pi_old of eq. 2;
(3) gate: which episodes are pulled towards the reference, in DGPO the wrong ones (eq. 4);
(4) KL of the student to the reference (the teacher, or the model that training started from), which reads
    the episodes whose gate is open, and no others but for an audit;
(5) rewards: exact match and, where the recipe places it there, the KL (eqs. 3 and 4);
(6) advantages: over a critic's values (PPO), the mean of the step's tokens (REINFORCE), or other episodes of
    the same question (GRPO);
(7) update: the clipped surrogate (eq. 2), the entropy and, where the recipe places it there, the KL, of which
    (4) is then a part of this pass; under PPO also the critic.

(1) and the loop are here, (2) to (6) `ExperienceMaker` (`experience.py`), (7) `Updater` (`update.py`). Only
tokens that the model wrote have an advantage, a KL and a gradient; the prompt's and the environment's are
context.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Decode, Episode
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.threads import single_threaded
from dgpo_core.training.batches import (
    TokenBatch,
    TokenModel,
    backbone_of,
    check_ids,
    counted_hidden,
    shared_ids,
)
from dgpo_core.training.checkpoint import BestModel, Checkpoint, require_finite, training_step
from dgpo_core.training.engines import FrozenModel, TrainingEngine, training_engine
from dgpo_core.training.episode_sources import Metrics, Rollout, question_order, shuffled, usable
from dgpo_core.training.experience import Answered, ExperienceMaker, training_metrics
from dgpo_core.training.optimizer import Optimization, constant
from dgpo_core.training.overlap import StepEpisodes
from dgpo_core.training.update import GuidanceLoss, Updater

# Training stops when one of these is no number; causes first, as the first one says what to lower.
WATCHED = ["kl_inside", "kl_outside", "reward", "value_loss", "critic_grad_norm", "policy_loss", "entropy"]
WATCHED += ["guidance_loss", "preserve_loss", "approx_kl", "actor_grad_norm"]


@dataclass
class Reinforcer:
    """Trains `student` in place. `reference` is the model that the recipe names, frozen.

    `sampler` is the model that rolls out: a copy of the student under `overlap`, by default the student.
    Distributions are over the ids that the tokenizer knows, the first `known`, as far as both models have
    rows for them; None: all of these rows. `answered` are the questions that the teacher answers correctly,
    for the gate `teachable`; `decode` is the tokenizer's, for `repeat_penalty`.
    """

    student: PreTrainedModel
    reference: PreTrainedModel | None
    recipe: Reinforcement
    config: ReinforceConfig
    compute: ComputeConfig
    seed: int
    known: int | None = None
    sampler: PreTrainedModel | None = None
    answered: Answered = frozenset()
    decode: Decode | None = None

    def __post_init__(self) -> None:
        self.vocabulary = shared_ids(self.known, self.student, self.reference)

    @single_threaded()
    def train(
        self,
        questions: int,
        rollout: Rollout,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Train on questions 0 to `questions` - 1 and return one row of metrics a step.

        With `patience` the student is in the end the best of those that were validated.
        Resume from the checkpoint exactly. `report` is called with the number of steps and the rows so far.
        Raise NotFinite at the first step that gives no numbers; the checkpoint is then the last before it.
        """
        config = self.config
        torch.manual_seed(self.seed)
        actor, reference, critic = self._engines()
        best = BestModel(config.patience)
        parts: dict[str, Any] = {"actor": actor, "best": best}
        if critic is not None:
            parts["critic"] = critic
        rows: list[Metrics] = []
        stepped = StepEpisodes(
            lambda step: rollout(self._questions(questions, step), step),
            self.student,
            self.sampler or self.student,
            config.steps,
        )
        if state := checkpoint.load():
            rows, stepped.pending = state["rows"], state.get("pending")
            for name, part in parts.items():
                part.load_state_dict(state[name])
        maker = ExperienceMaker(
            actor, reference, critic, self.recipe, config, self.compute, self.answered, self.decode
        )
        guidance = GuidanceLoss.of(self.recipe, reference)
        updater = Updater(actor, critic, config, self.compute, guidance)
        actor.publish()
        for step in range(len(rows), config.steps):
            if best.over:
                break
            with training_step(step + 1, self._rate_behind):
                # (1) Roll out: the student as it is now answers the step's questions; or it has, a step ago.
                episodes = stepped.take(step)
                with stepped.ahead(step + 1):
                    row = self._learn(episodes, maker, updater, step)
                actor.publish()
                if (step + 1) % config.dev_every == 0 or step + 1 == config.steps:
                    stepped.refresh()
                    row["dev_em"] = evaluate()
                    best.validated(row["dev_em"], actor.weights)
            rows.append({"step": step + 1, **row})
            report(config.steps, rows)
            if (step + 1) % config.checkpoint_every == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save({"rows": rows, "pending": stepped.pending, **states})
        actor.finish(best.weights)
        return rows

    def _learn(self, episodes: list[Episode], maker: ExperienceMaker, updater: Updater, step: int) -> Metrics:
        """Do (2) to (7) with a step's episodes and return the step's metrics."""
        learned = usable(episodes)
        row: Metrics = {"gate_excluded": 1 - len(learned) / len(episodes)}
        if not learned:  # not one token of the student, where prompts leave it no room
            return row
        check_ids(learned, self.vocabulary)

        # (2) to (6) Log-probabilities, gate, KL, rewards, advantages.
        experience = maker.make(learned)
        row["gate_open"] = float(experience.gate.sum()) / len(episodes)
        row["gate_closed"] = 1 - row["gate_open"] - row["gate_excluded"]
        row |= training_metrics(learned, experience)
        row["unrewarded"] = float(not any(episode.correct for episode in learned))
        _require_numbers(row)  # before weights are changed by it

        # (7) Update, in mini-batches of shuffled episodes.
        order = shuffled(len(learned), f"mini-{self.seed}-{step}")
        row |= updater.update(experience, order, critic_only=step < self.config.critic_only_steps)
        _require_numbers(row)
        return row

    def _engines(self) -> tuple[TrainingEngine, FrozenModel | None, TrainingEngine | None]:
        """Return actor, reference and, for PPO, critic."""
        config, critic = self.config, None
        if self.recipe.algorithm == "ppo":  # made of the student while its weights are whole
            settings = self._optimization(config.critic_learning_rate, config.critic_learning_rate_warmup)
            critic = training_engine(Critic(self.student), settings, self.compute, published=False)
        settings = self._optimization(config.actor_learning_rate, config.actor_learning_rate_warmup)
        actor = training_engine(TokenModel(self.student, self.vocabulary), settings, self.compute)
        if self.reference is None:
            return actor, None, critic
        return actor, FrozenModel(self.reference, self.compute, self.vocabulary), critic

    def _optimization(self, learning_rate: float, warmup: float) -> Optimization:
        config = self.config
        updates = config.steps * (config.batch_size // config.mini_batch_size)
        schedule = constant(math.ceil(warmup * updates))
        return Optimization(learning_rate, config.weight_decay, config.max_grad_norm, schedule)

    def _questions(self, count: int, step: int) -> list[int]:
        """Return the indices of a step's questions; under GRPO each as often as its group has episodes."""
        group = self.config.group_size if self.recipe.algorithm == "grpo" else 1
        chosen = question_order(count, self.config.batch_size // group, step, self.seed)
        return [question for question in chosen for _ in range(group)]

    def _rate_behind(self, quantity: str) -> str:
        """Return the setting that a quantity which is no number asks to lower."""
        part = "critic" if quantity in ("value_loss", "critic_grad_norm") else "actor"
        return f"reinforce.{part}_learning_rate (now {getattr(self.config, f'{part}_learning_rate'):g})"


def _require_numbers(row: Metrics) -> None:
    """Raise NotFinite for a watched metric that is nan or infinite."""
    require_finite({name: row[name] for name in WATCHED if name in row})


class Critic(torch.nn.Module):
    """Gives the value of the state before each counted token: the student's backbone with a fresh head."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone_of(student))
        self.head = torch.nn.Linear(student.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.head.to(student.device)

    def forward(self, batch: TokenBatch) -> Float[Tensor, " N"]:
        """Return the values, float32."""
        values: Tensor = self.head(counted_hidden(self.backbone, batch))
        return values.float()[:, 0]
