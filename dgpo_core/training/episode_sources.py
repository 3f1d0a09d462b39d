"""Where a step's episodes come from: teacher, student or both (docs/method.md, "Recipes"); their metrics.

Random choices depend on the seed and the step alone, and what else decides has a `state_dict`: a training
that was killed is continued exactly.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from dgpo_core.config.training import DistillConfig
from dgpo_core.errors import InfrastructureError

Metrics = dict[str, float]
Rollout = Callable[[list[int], int], list[Episode]]  # (indices of questions, step) -> episodes of the student


def batch_order(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the indices of every batch: a new shuffle each epoch, and no example left out."""
    batches = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"distill-{seed}-{epoch}").shuffle(order)
        batches += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches


def question_order(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the indices of a step's questions: epochs of shuffled questions laid end to end."""
    places = [divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: _shuffled(count, epoch, seed) for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][offset] for epoch, offset in places]


def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"questions-{seed}-{epoch}").shuffle(order)
    return order


class EpisodeSource(Protocol):
    """Gives each step its episodes. The student is validated every `validate_every` steps."""

    steps: int
    validate_every: int
    held_out: list[Episode]  # for a validation loss, which `validated` is called with; may be empty

    def batch(self, step: int) -> list[Episode]: ...

    def validated(self, loss: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TeacherEpisodes:
    """Gives the teacher's episodes, for some epochs."""

    episodes: list[Episode]
    config: DistillConfig
    seed: int
    held_out: list[Episode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = batch_order(len(self.episodes), self.config.batch_size, self.config.epochs, self.seed)
        self.steps = len(self._order)
        self.validate_every = self.steps // self.config.epochs

    def batch(self, step: int) -> list[Episode]:
        return [self.episodes[i] for i in self._order[step]]

    def validated(self, loss: float) -> None:
        """Do nothing: no batch depends on the loss."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: a step's batch depends on its number alone."""


class StudentEpisodes:
    """Gives fresh episodes of the student at every step: on-policy distillation."""

    held_out: list[Episode]

    def __init__(self, rollout: Rollout, questions: int, config: DistillConfig, seed: int) -> None:
        self._rollout, self._questions, self._seed = rollout, questions, seed
        self._batch_size = config.on_policy.batch_size
        self.steps, self.validate_every = config.on_policy.steps, config.on_policy.dev_every
        self.held_out = []

    def batch(self, step: int) -> list[Episode]:
        """Roll out; the batch is empty where no episode has a token of the student."""
        chosen = question_order(self._questions, self._batch_size, step, self._seed)
        return usable(self._rollout(chosen, step))

    def validated(self, loss: float) -> None:
        """Do nothing: no batch depends on the loss."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: a step's batch depends on its number and the student's weights alone."""


class MixedEpisodes:
    """Gives teacher episodes, and more and more of the student's, fresh and replayed ones (DistiLLM)."""

    def __init__(
        self, episodes: list[Episode], rollout: Rollout, questions: int, config: DistillConfig, seed: int
    ) -> None:
        drawn = list(episodes)  # they lie data set after data set
        random.Random(f"held-out-{seed}").shuffle(drawn)
        held_out = min(config.distillm.validation, math.ceil(len(drawn) / 10), len(drawn) - 1)
        self.held_out = drawn[:held_out]
        self._teacher = TeacherEpisodes(drawn[held_out:], config, seed)
        self._rollout, self._questions, self._seed = rollout, questions, seed
        self._batch_size = config.batch_size
        self.steps, self.validate_every = self._teacher.steps, self._teacher.validate_every
        settings = config.distillm
        self.off_policy = OffPolicySchedule(self.steps, settings.growth, settings.tolerance)
        self._buffer: deque[Episode] = deque(maxlen=settings.replay)  # the student's newest

    def batch(self, step: int) -> list[Episode]:
        rng = random.Random(f"mixture-{self._seed}-{step}")
        buffer_full = len(self._buffer) == self._buffer.maxlen
        match self.off_policy.origin(rng.random(), step + 1, buffer_full):
            case Origin.TEACHER:
                return self._teacher.batch(step)
            case Origin.REPLAY:
                return rng.sample(list(self._buffer), self._batch_size)
        chosen = question_order(self._questions, self._batch_size, step, self._seed)
        fresh = usable(self._rollout(chosen, step))
        self._buffer.extend(fresh)
        return fresh

    def validated(self, loss: float) -> None:
        self.off_policy.update(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"off_policy": self.off_policy.state_dict(), "buffer": {"items": list(self._buffer)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.off_policy.load_state_dict(state["off_policy"])
        self._buffer.clear()
        self._buffer.extend(state["buffer"]["items"])


class Origin(StrEnum):
    """Where a batch of DistiLLM comes from."""

    TEACHER = "teacher"  # the fixed teacher episodes
    STUDENT = "student"  # fresh ones of the student, which go into the replay buffer too
    REPLAY = "replay"  # the student's earlier ones


@dataclass
class OffPolicySchedule:
    """Decides which share of the batches is the student's, `phi` (DistiLLM's adaptive off-policy scheduler).

    The share grows by `growth`, to at most 1, whenever the validation loss (nats) is `tolerance` or more
    above the one at the last growth, the first being that of the untrained student (Ko et al., 2024, and its
    code).
    """

    total_steps: int
    growth: float = 0.1
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        self.phi = 0.0
        self.reference_loss: float | None = None

    def update(self, loss: float) -> None:
        """Adapt the share to a validation loss; the first is measured before training."""
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self.tolerance:
            self.phi = min(1.0, self.phi + self.growth)
            self.reference_loss = loss

    def origin(self, draw: float, step: int, buffer_full: bool) -> Origin:
        """Return the origin of the batch of update `step` (from 1), given a draw that is uniform on [0, 1).

        The share 1 - step / total_steps of the student's batches is fresh. As in the released code all are,
        until the buffer is full.
        """
        if draw >= self.phi:
            return Origin.TEACHER
        if draw < self.phi * (1 - step / self.total_steps) or not buffer_full:
            return Origin.STUDENT
        return Origin.REPLAY

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "reference_loss": self.reference_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.reference_loss = state["phi"], state["reference_loss"]


def usable(episodes: list[Episode]) -> list[Episode]:
    """Select the episodes of a step to learn from. Raise InfrastructureError when all have failed.

    Something is down then: a step that learns nothing would let the training end as if nothing had happened,
    and a step that is tried again from the checkpoint is the step that it would have been.
    """
    require_answered(episodes)
    return without_failed(episodes)


def require_answered(episodes: list[Episode]) -> None:
    """Raise InfrastructureError when all episodes have failed."""
    if episodes and all(episode.outcome is Outcome.FAILED for episode in episodes):
        raise InfrastructureError(f"all {len(episodes)} episodes of a step failed: {episodes[0].failure}")


def without_failed(episodes: list[Episode]) -> list[Episode]:
    """Select the episodes from which there is something to learn."""
    return [e for e in episodes if e.outcome is not Outcome.FAILED and e.model_tokens]


def episode_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Average what shows collapse over the episodes: EM, length, invalid actions, searches, ..."""
    n = len(episodes)
    return {
        "em": sum(e.correct for e in episodes) / n,
        "response_tokens": sum(e.model_tokens for e in episodes) / n,
        "searches": sum(len(e.searches) for e in episodes) / n,
        "hit": sum(e.hit for e in episodes) / n,
        "invalid_actions": sum(e.invalid_actions for e in episodes) / n,
        "well_formed": sum(e.well_formed for e in episodes) / n,
        "no_answer": sum(e.ending is not Ending.ANSWERED for e in episodes) / n,
    }


def sampled_entropy(episodes: Sequence[Episode]) -> float:
    """Estimate the sampling policy's entropy, nats a token, by -log p of the tokens that it has sampled."""
    surprises = [
        -logprob
        for episode in episodes
        for logprob, owner in zip(episode.logprobs, episode.owners, strict=True)
        if owner == Owner.MODEL
    ]
    return sum(surprises) / len(surprises)
