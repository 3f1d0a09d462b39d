"""One file, whole or not there."""

from pathlib import Path

import pytest
import torch

from dgpo_core.errors import UserError
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


@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_file_is_named(tmp_path: Path, left: int) -> None:
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save({"weights": torch.zeros(100)})
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"checkpoint\.pt: not readable .*delete it"):
        checkpoint.load()
