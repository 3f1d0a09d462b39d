"""Many episodes in chunks, each kept on disk when done: a killed collection continues where it was."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from dgpo_core.config.protocol import Sampling
from dgpo_core.errors import InfrastructureError
from dgpo_core.protocol.episode import Episode, Outcome, read_episodes, write_episodes
from dgpo_core.rollout.loop import AgentLoop, Task


def collect(
    loop: AgentLoop,
    tasks: list[Task],
    sampling: Sampling,
    chunk: int,
    state: Path,
    progress: Callable[[int, int, float], None],
) -> list[Episode]:
    """Episodes of all tasks, in order. `progress` gets done, total and the EM so far.

    Chunks are cut the same way every time, so an interrupted collection gives the same episodes. Raises
    InfrastructureError when every episode of a chunk failed: something is down, and what is done is kept.
    """
    state.mkdir(parents=True, exist_ok=True)
    episodes: list[Episode] = []
    for start in range(0, len(tasks), chunk):
        part = tasks[start : start + chunk]
        path = state / f"{start:08d}.parquet"
        if path.exists():
            episodes += read_episodes(path)
        else:
            new = loop.run(part, sampling)
            if all(episode.outcome is Outcome.FAILED for episode in new):
                raise InfrastructureError(f"all {len(new)} episodes of a chunk failed: {new[0].failure}")
            if not any(episode.outcome is Outcome.FAILED for episode in new):  # else: tried again next time
                temporary = path.with_suffix(".part")
                write_episodes(temporary, new)
                os.replace(temporary, path)
            episodes += new
        progress(len(episodes), len(tasks), em_of(episodes))
    return episodes


def em_of(episodes: list[Episode]) -> float:
    """Share of correct among the episodes that did not fail; nan when there is none."""
    counted = [episode for episode in episodes if episode.outcome is not Outcome.FAILED]
    return sum(episode.correct for episode in counted) / len(counted) if counted else float("nan")


def stable_seed(*parts: object) -> int:
    """A 32-bit seed from names and numbers, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
