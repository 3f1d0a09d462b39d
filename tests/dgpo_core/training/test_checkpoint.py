"""One file, whole or not there."""

from pathlib import Path

import pytest
import torch

from dgpo_core.training.checkpoint import Checkpoint


class Breaks:
    def __reduce__(self) -> str:
        raise KeyboardInterrupt


def test_newest_state_survives_a_kill_while_saving(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "state" / "deep")
    assert checkpoint.load() is None
    for step in range(2):
        checkpoint.save({"step": step, "weights": torch.full((3,), float(step))})
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2, "weights": Breaks()})
    state = Checkpoint(tmp_path / "state" / "deep").load()
    assert state is not None
    assert state["step"] == 1
    assert state["weights"].tolist() == [1, 1, 1]
