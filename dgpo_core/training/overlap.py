"""The next step's episodes while a step trains: one step off-policy (`reinforce.overlap`).

A copy of the student samples them, in a thread, with the weights as they were before the step's update: the
episodes of step n are those of the weights after step n - 2, and the first two steps' those of the initial
ones. `importance_weights` corrects for what lies between (truncated; Espeholt et al., 2018).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dgpo_core.agent.episode import Episode
from dgpo_core.errors import NotFinite
from dgpo_core.training.episode_sources import require_answered


@dataclass
class StepEpisodes:
    """Gives each step its episodes, `rollout(step)`, which `sampler` writes.

    Where `sampler` is `student` itself, every step's are sampled when it asks for them. Where it is a copy,
    they are sampled `ahead`.
    """

    rollout: Callable[[int], list[Episode]]
    student: PreTrainedModel
    sampler: PreTrainedModel
    steps: int
    pending: list[Episode] | None = None  # of the next step: a checkpoint keeps them

    def take(self, step: int) -> list[Episode]:
        """Return the step's episodes."""
        episodes, self.pending = self.pending, None
        if episodes is None:
            self.refresh()
            episodes = self.rollout(step)
        return episodes

    @contextmanager
    def ahead(self, step: int) -> Iterator[None]:
        """Sample the episodes of `step`, if there is one, with the weights as they are, while the body runs.

        Whatever happens there, the thread has ended afterwards. Raise InfrastructureError when all episodes
        have failed: no checkpoint must keep them.
        """
        if self.sampler is self.student or step == self.steps:
            yield
            return
        self.refresh()
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
            future = thread.submit(self.rollout, step)
            yield
        try:
            self.pending = future.result()
        except NotFinite:
            return  # of the next step: it asks again, and is dropped where that fails too
        require_answered(self.pending)

    def refresh(self) -> None:
        """Give the sampler the student's weights as they are now."""
        if self.sampler is not self.student:
            pairs = zip(self.sampler.parameters(), self.student.parameters(), strict=True)
            with torch.no_grad():
                for copied, newest in pairs:
                    copied.copy_(newest)
