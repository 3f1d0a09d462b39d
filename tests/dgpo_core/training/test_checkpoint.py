"""A checkpoint is whole or not there; a quantity that is no number ends a training and says what to lower."""

import math
import sys
import types
from pathlib import Path

import pytest
import torch

from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step


class Moved:
    """Of a module that is no longer there, or no longer has it."""


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
    with pytest.raises(UserError, match=r"checkpoint\.pt: not readable: .*delete it"):
        checkpoint.load()


@pytest.mark.parametrize("name", ["dgpo_core.elsewhere", "dgpo_core.training"])
def test_a_file_of_code_that_has_moved_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path)
    module = types.ModuleType(name)
    with monkeypatch.context() as context:
        context.setitem(sys.modules, name, module)
        context.setattr(Moved, "__module__", name)
        module.__dict__["Moved"] = Moved
        checkpoint.save({"item": Moved()})
    with pytest.raises(UserError, match=r"not readable: damaged, or of another version of this code"):
        checkpoint.load()


@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "not a number"), (math.inf, "infinite"), (-math.inf, "infinite")]
)
def test_the_first_quantity_that_is_none_is_named_with_step_and_setting(value: float, said: str) -> None:
    require_finite({"loss": 1e30, "ce": 0.0})
    with (
        pytest.raises(NotFinite, match=f"^the ce of step 7 is {said}; lower the rate of ce$"),
        training_step(7, lambda quantity: f"the rate of {quantity}"),
    ):
        require_finite({"loss": 0.5, "ce": value, "grad_norm": math.nan})


def test_in_the_first_step_no_rate_may_be_to_blame() -> None:
    with (
        pytest.raises(
            NotFinite, match=r"of step 1 is .*lower the rate; if that does not help, the model's weig"
        ),
        training_step(1, lambda _: "the rate"),
    ):
        require_finite({"loss": math.nan})
