"""Where a distillation's episodes come from: teacher, student, or both (docs/method.md, "Recipes")."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from dgpo_core.agent.episode import Episode, Outcome
from dgpo_core.config.training import DistillConfig
from dgpo_core.errors import InfrastructureError
from dgpo_core.training.taid import OffPolicy, ReplayBuffer, Source

Rollout = Callable[[list[int], int], list[Episode]]  # (indices of questions, step) -> episodes of the student


def batch_order(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Indices of every batch: a new shuffle each epoch, and no example left out."""
    batches = []
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"distill-{seed}-{epoch}").shuffle(order)
        batches += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return batches


def question_order(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of a step's questions: epochs of shuffled questions laid end to end."""
    places = [divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: _shuffled(count, epoch, seed) for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][offset] for epoch, offset in places]


def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"questions-{seed}-{epoch}").shuffle(order)
    return order


class EpisodeSource(Protocol):
    """Gives each step its episodes; between two looks at the validation questions lie `per_look` steps."""

    steps: int
    per_look: int
    held_out: list[Episode]  # for a validation loss, which `looked` is told; may be empty

    def batch(self, step: int) -> list[Episode]: ...

    def looked(self, validation_loss: float) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TeacherEpisodes:
    """Epochs over the teacher's episodes."""

    episodes: list[Episode]
    config: DistillConfig
    seed: int
    held_out: list[Episode] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = batch_order(len(self.episodes), self.config.batch_size, self.config.epochs, self.seed)
        self.steps = len(self._order)
        self.per_look = self.steps // self.config.epochs

    def batch(self, step: int) -> list[Episode]:
        return [self.episodes[i] for i in self._order[step]]

    def looked(self, validation_loss: float) -> None:
        """Nothing depends on it here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state: a step's batch depends on its number alone."""


class StudentEpisodes:
    """Fresh episodes of the student at every step: on-policy distillation."""

    held_out: list[Episode]

    def __init__(self, rollout: Rollout, questions: int, config: DistillConfig, seed: int) -> None:
        self._rollout, self._questions, self._seed = rollout, questions, seed
        self._batch_size = config.on_policy.batch_size
        self.steps, self.per_look = config.on_policy.steps, config.on_policy.dev_every
        self.held_out = []

    def batch(self, step: int) -> list[Episode]:
        """May be empty: an episode without a token of the student teaches nothing."""
        chosen = question_order(self._questions, self._batch_size, step, self._seed)
        return usable(self._rollout(chosen, step))

    def looked(self, validation_loss: float) -> None:
        """Nothing depends on it here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state: the student's weights and the step's number say everything."""


class MixedEpisodes:
    """DistiLLM: teacher episodes, and more and more of the student's, fresh ones and replayed ones."""

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
        self.steps, self.per_look = self._teacher.steps, self._teacher.per_look
        settings = config.distillm
        self.off_policy = OffPolicy(self.steps, settings.growth, settings.tolerance)
        self._buffer: ReplayBuffer[Episode] = ReplayBuffer(settings.replay)

    def batch(self, step: int) -> list[Episode]:
        rng = random.Random(f"mixture-{self._seed}-{step}")
        match self.off_policy.source(rng.random(), step + 1, self._buffer.full):
            case Source.TEACHER:
                return self._teacher.batch(step)
            case Source.REPLAY:
                return self._buffer.sample(self._batch_size, rng)
        chosen = question_order(self._questions, self._batch_size, step, self._seed)
        fresh = usable(self._rollout(chosen, step))
        self._buffer.add(fresh)
        return fresh

    def looked(self, validation_loss: float) -> None:
        self.off_policy.validate(validation_loss)

    def state_dict(self) -> dict[str, Any]:
        return {"off_policy": self.off_policy.state_dict(), "buffer": self._buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.off_policy.load_state_dict(state["off_policy"])
        self._buffer.load_state_dict(state["buffer"])


def usable(episodes: list[Episode]) -> list[Episode]:
    """Of a step's episodes those to learn from. Raises InfrastructureError when all have failed.

    Something is down then: a step that learns nothing would let the training end as if nothing had happened,
    and a step that is tried again from the checkpoint is the step that it would have been.
    """
    require_answered(episodes)
    return without_failed(episodes)


def require_answered(episodes: list[Episode]) -> None:
    """Raises InfrastructureError when all episodes have failed."""
    if episodes and all(episode.outcome is Outcome.FAILED for episode in episodes):
        raise InfrastructureError(f"all {len(episodes)} episodes of a step failed: {episodes[0].failure}")


def without_failed(episodes: list[Episode]) -> list[Episode]:
    """The episodes from which there is something to learn."""
    return [e for e in episodes if e.outcome is not Outcome.FAILED and e.model_tokens]
