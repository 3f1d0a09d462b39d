"""Lengths of episodes: counted in a table, or assumed within the protocol's limits."""

from pathlib import Path

import numpy as np
import pytest

from dgpo_core.agent.episode import Owner, write_episodes
from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.planning.workload import assumed, first_measured
from tests.dgpo_core.making import random_episode


def test_lengths_are_counted_by_owner(tmp_path: Path) -> None:
    episodes = [random_episode(seed) for seed in range(20)]
    path = tmp_path / "episodes.parquet"
    write_episodes(path, episodes)
    lengths = first_measured([tmp_path / "none.parquet", path])
    assert lengths is not None
    for part, owner in (
        (lengths.prompt, Owner.PROMPT),
        (lengths.model, Owner.MODEL),
        (lengths.environment, Owner.ENVIRONMENT),
    ):
        assert part == pytest.approx(np.mean([e.owners.count(owner) for e in episodes]))
    sizes = [len(e.owners) for e in episodes]
    assert lengths.total == pytest.approx(np.mean(sizes))
    assert lengths.square == pytest.approx(np.mean(np.square(sizes)))
    assert lengths.turns == pytest.approx(np.mean([e.generations for e in episodes]))
    assert "measured: 20 episodes" in lengths.source


def test_without_episodes_nothing_is_measured(tmp_path: Path) -> None:
    write_episodes(tmp_path / "empty.parquet", [])
    assert first_measured([tmp_path / "none.parquet", tmp_path / "empty.parquet"]) is None


@pytest.mark.parametrize("context", [300, 1024, 4096])
@pytest.mark.parametrize("turns", [0, 1, 4])
def test_assumed_episodes_keep_to_the_limits(context: int, turns: int) -> None:
    lengths = assumed(ProtocolConfig(max_context=context, max_turns=turns), 3)
    assert lengths.total <= context and lengths.turns <= turns + 1
