"""Distillation: the student learns the teacher's distributions (eq. 1; docs/method.md, "Recipes").

`Distiller.train` repeats one step:

(1) episodes: of the teacher, fresh ones of the student, or both (`episode_sources`);
(2) the teacher's distributions at the tokens that the model wrote: stored ones, or those of a live teacher;
(3) loss: cross-entropy of the tokens and a divergence between teacher and student (eq. 1), averaged over the
    batch's model tokens;
(4) update;
(5) adapt: TAID's share of the teacher in the target, DistiLLM's share of student episodes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode
from dgpo_core.config.recipes import Distillation
from dgpo_core.config.training import ComputeConfig, DistillConfig, TaidConfig
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.objectives import divergences
from dgpo_core.objectives.divergences import Divergence
from dgpo_core.objectives.logprobs import cached_losses, distillation_losses
from dgpo_core.objectives.rewards import kl_estimate
from dgpo_core.threads import single_threaded
from dgpo_core.training.batches import (
    TokenBatch,
    TokenModel,
    TokenSequence,
    check_ids,
    model_sequence,
    policy_function,
    shared_ids,
)
from dgpo_core.training.checkpoint import BestModel, Checkpoint, require_finite, training_step
from dgpo_core.training.engines import FrozenModel, summed, training_engine, update
from dgpo_core.training.episode_sources import EpisodeSource, Metrics, episode_metrics, sampled_entropy
from dgpo_core.training.optimizer import Optimization, cosine
from dgpo_core.training.teacher_cache import TeacherCache
from dgpo_core.training.watch import BAD, Watch


@dataclass
class Distiller:
    """Trains `student` in place. The teacher's distributions come from `cache`, or else from `teacher`.

    `ce` needs neither; for the student's episodes there is no cache. Distributions are over the ids that the
    tokenizer knows, the first `known`, as far as both models have rows for them; None: all of these rows.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    recipe: Distillation
    config: DistillConfig
    compute: ComputeConfig
    source: EpisodeSource
    cache: TeacherCache | None = None
    known: int | None = None
    watch: Watch = field(default_factory=Watch)

    def __post_init__(self) -> None:
        config = self.config
        self.vocabulary = shared_ids(self.known, self.student, self.teacher)
        self.taid = TaidSchedule(self.source.steps, config.taid)
        on_policy = self.recipe.episodes == "student"
        own = config.on_policy if on_policy else config
        schedule = cosine(self.source.steps, own.warmup_steps)
        settings = Optimization(own.learning_rate, config.weight_decay, config.max_grad_norm, schedule)
        self._rate = f"distill.{'on_policy.' if on_policy else ''}learning_rate (now {own.learning_rate:g})"
        self.engine = training_engine(TokenModel(self.student, self.vocabulary), settings, self.compute)
        self.frozen = None
        if self.teacher is not None:
            self.frozen = FrozenModel(self.teacher, self.compute, self.vocabulary)

    @single_threaded()
    def train(
        self,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Train and return one row of metrics a step, with `dev_em` where the student was validated.

        With `patience`, or rolled back, the student is in the end the best of those that were validated.
        Resume from the checkpoint exactly. `report` is called with the number of steps and the rows so far.
        A step with a metric that is no number is dropped; raise NotFinite after too many of them, and
        UserError for a collapse that stops training: the checkpoint is then of a step with numbers.
        """
        source = self.source
        best = BestModel(self.config.patience, self.watch.may_roll_back)
        engines = {"student": self.engine}
        parts: dict[str, Any] = {"source": source, "taid": self.taid, "best": best}
        rows: list[Metrics] = []
        if state := checkpoint.load():
            rows = state["rows"]
            for name, part in {**engines, **parts}.items():
                part.load_state_dict(state[name])
        elif source.held_out:
            source.validated(self.loss(source.held_out))
        for step in range(len(rows), source.steps):
            if best.over or self.watch.rolls_back(rows):
                break
            validates = (step + 1) % source.validate_every == 0 or step + 1 == source.steps
            with training_step(step + 1, lambda _: self._rate):
                with checkpoint.saved_when_stopped(engines, parts, rows=rows):
                    # (1) Episodes: a student that writes some needs its newest weights.
                    if self.recipe.episodes in ("student", "mixed"):
                        self.engine.publish()
                    row = self._step(rows)
                if validates:
                    self.engine.publish()
                    row["dev_em"] = evaluate()
                    best.validated(row["dev_em"], self.engine.weights)
                    if source.held_out:
                        row["validation_loss"] = self.loss(source.held_out)
                        source.validated(row["validation_loss"])
            rows.append({"step": step + 1, **row})
            report(source.steps, rows)
            if validates and BAD not in row:
                states = {name: part.state_dict() for name, part in {**engines, **parts}.items()}
                checkpoint.save({"rows": rows, **states})
        self.engine.finish(best.chosen(self.watch.rolls_back(rows)))
        return rows

    def _step(self, rows: list[Metrics]) -> Metrics:
        """Do the step after `rows` and return its metrics; drop it where a number is none."""
        step, episodes = len(rows), list[Episode]()
        try:
            episodes = self.source.batch(step)
            return self._learn(episodes, step)
        except NotFinite as error:
            if self.engine.spent:
                raise
            return self.watch.drop(rows, episodes, error)

    def _learn(self, episodes: list[Episode], step: int) -> Metrics:
        """Do (2) to (5) with a step's episodes and return the step's metrics."""
        if not episodes:  # not one with a token of the student
            return {"episodes": 0.0}
        # (2), (3) The teacher's distributions, and the gradient of the loss.
        row = {"episodes": float(len(episodes))}
        losses = self._averages([self._sequence(episode) for episode in episodes])
        # (4) Update.
        rate = {"learning_rate": self.engine.learning_rate}
        row |= update(self.engine, losses | rate, "grad_norm")
        # (5) Adapt TAID's target; DistiLLM's source adapts to the validation loss.
        if self.recipe.objective == "taid":
            row["taid_t"] = self.taid.t
            self.taid.update(row["loss"], step + 1)
        if self.recipe.episodes == "student":  # of a mixture it would be the teacher's EM too
            row |= episode_metrics(episodes)
            row["entropy"] = sampled_entropy(episodes)
        return row

    @torch.no_grad()
    def loss(self, episodes: Sequence[Episode]) -> float:
        """Return the objective on `episodes`, nats a token. Raise NotFinite."""
        loss = self._averages([self._sequence(episode) for episode in episodes])["loss"]
        require_finite({"validation loss": loss})
        return loss

    def _sequence(self, episode: Episode) -> TokenSequence:
        """Return the episode's model tokens with their stored distributions, if there are any."""
        check_ids([episode], self.vocabulary)
        stored = self.cache.get(episode) if self.cache else None
        if stored is None and self.teacher is None and self.recipe.objective != "ce":
            raise UserError(
                f"no distributions of the teacher's episode of {episode.dataset} {episode.question_id} were "
                "kept: run the stage distributions again, or set distill.teacher: live"
            )
        return replace(model_sequence(episode), teacher=stored)

    def _averages(self, sequences: list[TokenSequence]) -> Metrics:
        """Add up the gradient of the loss, and return the losses' averages over the model tokens."""
        tokens = sum(len(sequence.positions) for sequence in sequences)
        weights = self._weights()

        def objective(_: list[int], batch: TokenBatch) -> tuple[Float[Tensor, ""], Metrics]:
            losses = {name: values.sum() / tokens for name, values in self._losses(batch).items()}
            loss = sum((weights[name] * losses[name] for name in weights), torch.tensor(0.0))
            return loss, {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}

        limit = self.compute.micro_batch_tokens
        return summed(self.engine, sequences, limit, ["loss", *weights], objective)

    def _weights(self) -> dict[str, float]:
        """Return the weights of the losses (eq. 1)."""
        if self.recipe.objective == "kd":
            return {"ce": self.config.ce_weight, "divergence": self.config.kl_weight}
        return {"ce": 1.0} if self.recipe.objective == "ce" else {"ce": 0.0, "divergence": 1.0}

    def _losses(self, batch: TokenBatch) -> dict[str, Float[Tensor, " N"]]:
        """Return cross-entropy and, with a teacher, divergence of every counted token."""
        if self.recipe.objective == "ce":
            return {"ce": -self.engine(batch)}
        divergence, stored, frozen = self._divergence(), batch.teacher, self.frozen
        if stored is not None:
            losses = self.engine(
                batch, lambda h, head: cached_losses(h, head, stored, batch.targets, divergence)
            )
        else:
            assert frozen is not None
            if self.recipe.objective == "k1":  # of each token that the student has sampled
                with torch.no_grad():
                    teacher = frozen(batch, policy_function(batch))[0]
                logprobs = self.engine(batch)
                return {"ce": -logprobs, "divergence": kl_estimate(logprobs, teacher, "k1")}
            theirs = frozen.hidden(batch)
            losses = self.engine(
                batch,
                lambda h, head: distillation_losses(h, head, theirs, frozen.head, batch.targets, divergence),
            )
        return dict(zip(("ce", "divergence"), losses, strict=True))

    def _divergence(self) -> Divergence:
        match self.recipe.objective:
            case "taid":
                return divergences.taid(self.taid.t)
            case "skew_kl":
                return divergences.skew_kl(self.config.skew)
            case "skew_reverse_kl":
                return divergences.skew_reverse_kl(self.config.skew)
            case "reverse_kl":
                return divergences.reverse_kl
            case "jsd":
                return divergences.generalized_jsd(self.config.jsd_beta)
        return divergences.forward_kl


class TaidSchedule:
    """Decides the teacher's share in TAID's target, `t` (Shing et al., 2025; `divergences.taid`).

    The share rises at least linearly from `start` to `end` over `total_steps`, and faster while the loss
    falls: `trend` is the moving average of the loss's relative fall, with weight `decay` on the past.
    """

    def __init__(self, total_steps: int, config: TaidConfig) -> None:
        self._total_steps, self._config = total_steps, config
        self.t = config.start
        self.trend = 0.0
        self.previous_loss: float | None = None

    def update(self, loss: float, step: int) -> None:
        """Set the `t` of the next update, given the training loss of update number `step` (from 1).

        The first loss has nothing to be compared with and leaves `t` alone, as in the released code.
        """
        config = self._config
        if self.previous_loss is not None:
            fall = (self.previous_loss - loss) / (self.previous_loss + 1e-15)
            self.trend = config.decay * self.trend + (1 - config.decay) * fall
            # by tanh: the sigmoid's exp() would overflow after a loss that has exploded
            sigmoid = 0.5 * (1 + math.tanh(self.trend / 2))
            adaptive = self.t + config.step_size * sigmoid * (1 - self.t)
            linear = config.start + (config.end - config.start) * step / self._total_steps
            self.t = min(config.end, max(linear, adaptive))
        self.previous_loss = loss

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "trend": self.trend, "previous_loss": self.previous_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.trend, self.previous_loss = state["t"], state["trend"], state["previous_loss"]
