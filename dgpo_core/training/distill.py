"""Distillation: the student learns the teacher's distributions (eq. 1; docs/method.md, "Recipes")."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode
from dgpo_core.config.recipes import Distillation
from dgpo_core.config.training import ComputeConfig, DistillConfig
from dgpo_core.errors import UserError
from dgpo_core.objectives import divergences
from dgpo_core.objectives.divergences import Divergence
from dgpo_core.objectives.logprobs import cached_terms, distillation_terms
from dgpo_core.training import optimizer as optim
from dgpo_core.training.batches import (
    TokenBatch,
    TokenModel,
    TokenSequence,
    check_ids,
    collate,
    episode_metrics,
    micro_batches,
    model_sequence,
    sampled_entropy,
    shared_ids,
)
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step
from dgpo_core.training.engines import FrozenModel, Optimization, training_engine
from dgpo_core.training.episode_sources import EpisodeSource
from dgpo_core.training.parallel import added, passes
from dgpo_core.training.taid import Interpolation
from dgpo_core.training.teacher_cache import TeacherCache

Metrics = dict[str, float]


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

    def __post_init__(self) -> None:
        config, taid = self.config, self.config.taid
        self.vocabulary = shared_ids(self.known, self.student, self.teacher)
        self.taid = Interpolation(self.source.steps, taid.start, taid.end, taid.step_size, taid.decay)
        on_policy = self.recipe.episodes == "student"
        own = config.on_policy if on_policy else config
        how = Optimization(
            own.learning_rate,
            config.weight_decay,
            config.max_grad_norm,
            optim.cosine(self.source.steps, own.warmup_steps),
        )
        self._rate = f"distill.{'on_policy.' if on_policy else ''}learning_rate (now {own.learning_rate:g})"
        self.engine = training_engine(TokenModel(self.student, self.vocabulary), how, self.compute)
        self.frozen = None
        if self.teacher is not None:
            self.frozen = FrozenModel(self.teacher, self.compute, self.vocabulary)

    def train(
        self,
        checkpoint: Checkpoint,
        evaluate: Callable[[], float],
        report: Callable[[int, list[Metrics]], None],
    ) -> list[Metrics]:
        """Rows of metrics, one a step; `dev_em` is in the rows of the looks. Resumes if it can.

        `report` is given the number of steps and the rows so far. Raises NotFinite at the first step with a
        metric that is no number; the checkpoint is then the last one before it.
        """
        source = self.source
        parts: dict[str, Any] = {"student": self.engine, "source": source, "taid": self.taid}
        rows: list[Metrics] = []
        if state := checkpoint.load():
            rows = state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        elif source.held_out:
            source.looked(self.loss(source.held_out))
        for step in range(len(rows), source.steps):
            looks = (step + 1) % source.per_look == 0 or step + 1 == source.steps
            with training_step(step + 1, lambda _: self._rate):
                if self.recipe.episodes != "teacher":
                    self.engine.publish()
                row = self._step(source.batch(step), step)
                if looks:
                    self.engine.publish()
                    row["dev_em"] = evaluate()
                    if source.held_out:
                        row["validation_loss"] = self.loss(source.held_out)
                        source.looked(row["validation_loss"])
            rows.append({"step": step + 1, **row})
            report(source.steps, rows)
            if looks:
                checkpoint.save({"rows": rows, **{name: part.state_dict() for name, part in parts.items()}})
        self.engine.finish()
        return rows

    def _step(self, episodes: list[Episode], step: int) -> Metrics:
        if not episodes:  # not one with a token of the student
            return {"episodes": 0.0}
        row = self._accumulate([self._sequence(episode) for episode in episodes])
        row["learning_rate"] = self.engine.learning_rate
        row["grad_norm"] = self.engine.step()
        if self.recipe.objective == "taid":
            row["taid_t"] = self.taid.t
            self.taid.update(row["loss"], step + 1)
        if self.recipe.episodes == "student":  # of a mixture it would be the teacher's EM too
            row |= episode_metrics(episodes)
            row["entropy"] = sampled_entropy(episodes)
        require_finite(row)
        return row

    @torch.no_grad()
    def loss(self, episodes: list[Episode]) -> float:
        """The objective on `episodes`, nats a token. Raises NotFinite."""
        loss = self._sums([self._sequence(episode) for episode in episodes])["loss"]
        require_finite({"validation loss": loss})
        return loss

    def _sequence(self, episode: Episode) -> TokenSequence:
        check_ids([episode], self.vocabulary)
        sequence = model_sequence(episode)
        kept = self.cache.get(episode) if self.cache else None
        if kept is None and self.teacher is None and self.recipe.objective != "ce":
            raise UserError(
                f"no distributions of the teacher's episode of {episode.dataset} {episode.question_id} were "
                "kept: run the stage distributions again, or set distill.teacher: live"
            )
        return replace(sequence, teacher=kept)

    def _accumulate(self, sequences: list[TokenSequence]) -> Metrics:
        """Gradient of one batch; the losses are averages over its model tokens, however it is cut."""
        return self._sums(sequences, self.engine.backward)

    def _sums(
        self, sequences: list[TokenSequence], then: Callable[[torch.Tensor], None] | None = None
    ) -> Metrics:
        """Averages over the model tokens; `then` gets each micro-batch's share of the loss."""
        tokens = sum(len(sequence.positions) for sequence in sequences)
        weights = self._weights()
        totals = dict.fromkeys(["loss", *weights], 0.0)
        lengths = [len(sequence.ids) for sequence in sequences]
        parts = micro_batches(lengths, self.compute.micro_batch_tokens)
        for part, counts in passes(parts, self.engine.lockstep):
            batch = collate([sequences[i] for i in part], self.engine.device)
            terms = {name: values.sum() / tokens for name, values in self._terms(batch).items()}
            loss = sum((weights[name] * terms[name] for name in weights), torch.tensor(0.0))
            if then:
                then(loss if counts else 0 * loss)
            if not counts:
                continue
            for name, value in (("loss", loss), *terms.items()):
                totals[name] += value.item()
        return added(totals)

    def _weights(self) -> dict[str, float]:
        """What each term counts in the loss."""
        if self.recipe.objective == "kd":
            return {"ce": self.config.ce_weight, "divergence": self.config.kl_weight}
        return {"ce": 1.0} if self.recipe.objective == "ce" else {"ce": 0.0, "divergence": 1.0}

    def _terms(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """Cross-entropy and, with a teacher, divergence of every counted token, [N] each."""
        if self.recipe.objective == "ce":
            return {"ce": -self.engine(batch)}
        divergence, kept, frozen = self._divergence(), batch.teacher, self.frozen
        if kept is not None:
            terms = self.engine(batch, lambda h, head: cached_terms(h, head, kept, batch.targets, divergence))
        else:
            assert frozen is not None
            theirs = frozen.hidden(batch)
            terms = self.engine(
                batch,
                lambda h, head: distillation_terms(h, head, theirs, frozen.head, batch.targets, divergence),
            )
        return dict(zip(("ce", "divergence"), terms, strict=True))

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
