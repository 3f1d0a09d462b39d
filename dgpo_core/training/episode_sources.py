"""Where a step's episodes come from: teacher, student or both (docs/method.md, "Recipes"); their metrics.

Random choices depend on the seed and the step alone, and what else decides has a `state_dict`: a training
that was killed is continued exactly.
"""

import math
import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

from dgpo_core.agent.episode import Ending, Episode, Outcome, Owner
from dgpo_core.config.training import DistillConfig, DistillmConfig
from dgpo_core.errors import InfrastructureError, UserError

DEGENERATE = 0.8  # repetition; that of the embedded models is 0.12 when they search, 0.6 when they babble
Metrics = dict[str, float]
Rollout = Callable[[list[int], int], list[Episode]]  # (indices of questions, step) -> episodes of the student


def shuffled(count: int, key: str) -> list[int]:
    """Return the numbers below `count` in an order that `key` alone decides."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def batch_order(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Return the indices of every batch: a new shuffle each epoch, and no example left out."""
    orders = [shuffled(count, f"distill-{seed}-{epoch}") for epoch in range(epochs)]
    return [order[i : i + batch_size] for order in orders for i in range(0, count, batch_size)]


def question_order(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the indices of a step's questions: epochs of shuffled questions laid end to end."""
    places = [divmod(position, count) for position in range(step * batch_size, (step + 1) * batch_size)]
    orders = {epoch: shuffled(count, f"questions-{seed}-{epoch}") for epoch in {epoch for epoch, _ in places}}
    return [orders[epoch][offset] for epoch, offset in places]


def mini_batches(order: list[int], size: int) -> list[list[int]]:
    """Cut into as few parts of at most `size` as possible, of equal lengths to one.

    Where episodes failed, no single left-over episode makes an update of its own.
    """
    count = -(-len(order) // size)
    bounds = [len(order) * k // count for k in range(count + 1)]
    return [order[a:b] for a, b in pairwise(bounds)]


class EpisodeSource(ABC):
    """Gives each step its episodes. The student is validated every `validate_every` steps.

    By default a batch depends on the step and the student's weights alone.
    """

    steps: int
    validate_every: int
    held_out: Sequence[Episode] = ()  # for a validation loss, which `validated` is called with

    @abstractmethod
    def batch(self, step: int) -> list[Episode]:
        """Return the episodes of a step; none where no episode has a token of the student."""

    def validated(self, loss: float) -> None:  # noqa: B027  most batches do not depend on it
        """Adapt the batches that follow to a validation loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return what else decides batches."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from a `state_dict`."""


class TeacherEpisodes(EpisodeSource):
    """Gives the teacher's episodes, for some epochs."""

    def __init__(self, episodes: list[Episode], config: DistillConfig, seed: int) -> None:
        self._episodes = episodes
        self._order = batch_order(len(episodes), config.batch_size, config.epochs, seed)
        self.steps = len(self._order)
        self.validate_every = self.steps // config.epochs

    def batch(self, step: int) -> list[Episode]:
        return [self._episodes[i] for i in self._order[step]]


class StudentEpisodes(EpisodeSource):
    """Gives fresh episodes of the student at every step: on-policy distillation."""

    def __init__(self, rollout: Rollout, questions: int, config: DistillConfig, seed: int) -> None:
        self._rollout, self._questions, self._seed = rollout, questions, seed
        self._batch_size = config.on_policy.batch_size
        self.steps, self.validate_every = config.on_policy.steps, config.on_policy.dev_every

    def batch(self, step: int) -> list[Episode]:
        chosen = question_order(self._questions, self._batch_size, step, self._seed)
        return usable(self._rollout(chosen, step))


class MixedEpisodes(EpisodeSource):
    """Gives teacher episodes, and more and more of the student's, fresh and replayed ones (DistiLLM)."""

    def __init__(
        self, episodes: list[Episode], rollout: Rollout, questions: int, config: DistillConfig, seed: int
    ) -> None:
        # shuffled, as they lie data set after data set
        drawn = [episodes[i] for i in shuffled(len(episodes), f"held-out-{seed}")]
        held_out = min(config.distillm.validation, math.ceil(len(drawn) / 10), len(drawn) - 1)
        self.held_out = drawn[:held_out]
        self._teacher = TeacherEpisodes(drawn[held_out:], config, seed)
        self._rollout, self._questions, self._seed = rollout, questions, seed
        self._batch_size = config.batch_size
        self.steps, self.validate_every = self._teacher.steps, self._teacher.validate_every
        self.off_policy = OffPolicySchedule(self.steps, config.distillm)
        self._buffer: deque[Episode] = deque(maxlen=config.distillm.replay)  # the student's newest

    def batch(self, step: int) -> list[Episode]:
        rng = random.Random(f"mixture-{self._seed}-{step}")
        buffer_full = len(self._buffer) == self._buffer.maxlen
        match self.off_policy.origin(rng.random(), step + 1, buffer_full):
            case "teacher":
                return self._teacher.batch(step)
            case "replay":
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


class CorpusTexts(EpisodeSource):
    """Gives the corpus's text, for some epochs: sequences of equal length that are all the model's own.

    Texts, as token ids with an end, are laid end to end in a shuffled order and cut; the rest is left out.
    """

    def __init__(self, texts: list[list[int]], config: DistillConfig, seed: int) -> None:
        size = config.corpus.tokens
        ids = [token for i in shuffled(len(texts), f"corpus-{seed}") for token in texts[i]]
        sequences = [_text_episode(ids[i : i + size], i // size) for i in range(0, len(ids) - size + 1, size)]
        held_out = min(config.corpus.validation, len(sequences) // 10)
        self.held_out = sequences[:held_out]
        self._read = sequences[held_out:][: config.corpus.sequences]
        if not self._read:
            raise UserError(
                f"distill.corpus.tokens: the corpus has {len(ids)} tokens, not one sequence of {size}"
            )
        self._order = batch_order(len(self._read), config.batch_size, config.epochs, seed)
        self.steps, self.validate_every = len(self._order), config.corpus.dev_every

    def batch(self, step: int) -> list[Episode]:
        return [self._read[i] for i in self._order[step]]


def _text_episode(ids: list[int], number: int) -> Episode:
    """Return text in the form of an episode, whose first token, which nothing predicts, is its prompt."""
    owners: list[int] = [Owner.PROMPT, *[Owner.MODEL] * (len(ids) - 1)]
    return Episode(
        question_id=str(number),
        dataset="corpus",
        question="",
        golden_answers=[],
        sample=0,
        token_ids=ids,
        owners=owners,
        logprobs=[0.0] * len(ids),
        response="",
        prediction=None,
        outcome=Outcome.WRONG,
        ending=Ending.LENGTH,
        well_formed=False,
        hit=False,
        generations=1,
        invalid_actions=0,
        cut_turns=0,
    )


# of a batch of DistiLLM: fresh episodes of the student go into the replay buffer too
Origin = Literal["teacher", "student", "replay"]


class OffPolicySchedule:
    """Decides which share of the batches is the student's, `phi` (DistiLLM's adaptive off-policy scheduler).

    The share grows by `growth`, to at most 1, whenever the validation loss (nats) is `tolerance` or more
    above the one at the last growth, the first being that of the untrained student (Ko et al., 2024, and its
    code).
    """

    def __init__(self, total_steps: int, config: DistillmConfig) -> None:
        self._total_steps, self._growth, self._tolerance = total_steps, config.growth, config.tolerance
        self.phi = 0.0
        self.reference_loss: float | None = None

    def update(self, loss: float) -> None:
        """Adapt the share to a validation loss; the first is measured before training."""
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + self._tolerance:
            self.phi = min(1.0, self.phi + self._growth)
            self.reference_loss = loss

    def origin(self, draw: float, step: int, buffer_full: bool) -> Origin:
        """Return the origin of the batch of update `step` (from 1), given a draw that is uniform on [0, 1).

        The share 1 - step / total_steps of the student's batches is fresh. As in the released code all are,
        until the buffer is full.
        """
        if draw >= self.phi:
            return "teacher"
        if draw < self.phi * (1 - step / self._total_steps) or not buffer_full:
            return "student"
        return "replay"

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


def require_answered(episodes: list[Episode], max_failed_share: float = 1.0) -> None:
    """Raise InfrastructureError when all episodes have failed, or more than `max_failed_share` of them.

    Those that are left are no fair sample: an episode fails the likelier, the more it searches.
    """
    failed = [episode for episode in episodes if episode.outcome is Outcome.FAILED]
    if failed and len(failed) == len(episodes):
        raise InfrastructureError(f"all {len(failed)} episodes of a step failed: {failed[0].failure}")
    if len(failed) > max_failed_share * len(episodes):
        raise InfrastructureError(
            f"{len(failed)} of {len(episodes)} episodes of a step failed, more than watch.max_failed_share "
            f"({max_failed_share:g}): {failed[0].failure}"
        )


def without_failed(episodes: list[Episode]) -> list[Episode]:
    """Select the episodes from which there is something to learn."""
    return [e for e in episodes if e.outcome is not Outcome.FAILED and e.model_tokens]


def episode_metrics(episodes: Sequence[Episode]) -> Metrics:
    """Average what shows collapse over the episodes: EM, length, invalid actions, searches, ...

    `repetition` is among them only where it is degenerate.
    """
    n = len(episodes)
    return {
        "em": sum(e.correct for e in episodes) / n,
        "response_tokens": sum(e.model_tokens for e in episodes) / n,
        "searches": sum(len(e.searches) for e in episodes) / n,
        "hit": sum(e.hit for e in episodes) / n,
        "invalid_actions": sum(e.invalid_actions for e in episodes) / n,
        "well_formed": sum(e.well_formed for e in episodes) / n,
        "no_answer": sum(e.ending is not Ending.ANSWERED for e in episodes) / n,
        **({"repetition": repeated} if (repeated := repetition(episodes)) > DEGENERATE else {}),
    }


def repetition(episodes: Sequence[Episode]) -> float:
    """Return which share of a turn's 4-grams of tokens repeats earlier ones, on average over the turns.

    It is seq-rep-4 of Welleck et al. ("Neural text generation with unlikelihood training", 2020).
    """
    shares = []
    for episode in episodes:
        for turn in episode.turns:
            ids = episode.token_ids[turn.start : turn.end]
            if grams := list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)):
                shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def sampled_entropy(episodes: Sequence[Episode]) -> float:
    """Estimate the sampling policy's entropy, nats a token, by -log p of the tokens that it has sampled."""
    surprises = [
        -logprob
        for episode in episodes
        for logprob, owner in zip(episode.logprobs, episode.owners, strict=True)
        if owner == Owner.MODEL
    ]
    return sum(surprises) / len(surprises)
