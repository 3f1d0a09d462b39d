"""A checkpoint is whole or not there; a quantity that is no number ends a training and says what to lower."""

import math
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgpo_core.agent.episode import Outcome
from dgpo_core.errors import NotFinite, UserError
from dgpo_core.training.checkpoint import Checkpoint, require_finite, training_step
from tests.dgpo_core.making import random_episode


class Unknown:
    """Of a kind that no checkpoint holds."""


class Engine:
    """What a training updates: its weight is the number of updates."""

    lockstep = False

    def __init__(self) -> None:
        self.updates = 0

    def state_dict(self) -> dict[str, float]:
        return {"weight": float(self.updates)}


def saved(folder: Path, steps: int, **settings: Any) -> Checkpoint:
    """A checkpoint that has been saved so many times."""
    checkpoint = Checkpoint(folder, **settings)
    for step in range(steps):
        checkpoint.save({"step": step, "weights": torch.full((3,), float(step))})
    return checkpoint


def test_newest_state_survives_a_failure_while_saving(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "state" / "deep").load() is None
    checkpoint = saved(tmp_path / "state" / "deep", 2)
    with pytest.raises(TypeError, match="cannot hold a Unknown"):
        checkpoint.save({"step": 2, "weights": Unknown()})
    state = Checkpoint(tmp_path / "state" / "deep").load()
    assert state is not None
    assert state["step"] == 1
    assert state["weights"].tolist() == [1, 1, 1]


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Optimiser and schedule with their numbered keys, tied and cut tensors, episodes, infinity."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight])
    (weight.sum() ** 2).backward()
    optimizer.step()
    half = torch.randn(8).bfloat16()
    episode = random_episode(0)
    state: dict[str, Any] = {
        "rows": [{"em": 0.1 + 0.2, "loss": math.pi}, {}],
        "best": {"em": -math.inf, "weights": None},
        "optimizer": optimizer.state_dict(),
        "tied": [half, half, half[2:5], half[::2], torch.tensor(3), torch.zeros(0)],
        "pending": [episode],
    }
    checkpoint = Checkpoint(tmp_path)
    checkpoint.save(state)
    found = checkpoint.load()
    assert found is not None
    assert (found["rows"], found["best"], found["pending"]) == (state["rows"], state["best"], [episode])
    assert isinstance(found["pending"][0].outcome, Outcome)
    for own, expected in zip(found["tied"], state["tied"], strict=True):
        assert own.dtype == expected.dtype and torch.equal(own, expected)
    again = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 3))])
    again.load_state_dict(found["optimizer"])
    mine, theirs = again.state_dict()["state"][0], optimizer.state_dict()["state"][0]
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_as_many_as_asked_for_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "000001.part").mkdir(parents=True)  # of a process that was killed
    saved(tmp_path, 5, keep_last=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "000003",
        "000004",
        "000005",
    ]


@pytest.mark.parametrize("file", ["tensors.safetensors", "values.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "bit", "gone"])
def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path, file: str, damage: str) -> None:
    notes: list[str] = []
    checkpoint = saved(tmp_path, 3, note=notes.append)
    path = tmp_path / "checkpoints" / "000003" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:20])
        case "bit":
            path.write_bytes(content)
        case "gone":
            path.unlink()
    state = checkpoint.load()
    assert state is not None and state["step"] == 1
    assert len(notes) == 1 and "000003: damaged, not used" in notes[0]
    checkpoint.save(state)
    (tmp_path / "checkpoints" / "000004" / file).unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole; delete it, and the stage begins again"):
        Checkpoint(tmp_path, note=notes.append).load()


def test_sha256sum_finds_the_checksums_right(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    command = ["sha256sum", "--check", "--strict", "--status", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tmp_path / "checkpoints" / "000001").returncode == 0


def test_a_file_of_the_older_format_is_told_of_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    notes: list[str] = []
    assert Checkpoint(tmp_path, note=notes.append).load() is None
    assert len(notes) == 1 and "of an older version" in notes[0]


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_a_stop_saves_the_last_finished_step(tmp_path: Path, stop: type[BaseException]) -> None:
    """Not where weights have changed since, nor for engines whose state many processes have."""
    checkpoint, engine, part = Checkpoint(tmp_path), Engine(), {"t": 0.5}
    parts = {"taid": SimpleNamespace(state_dict=lambda: dict(part))}
    with pytest.raises(stop), checkpoint.saved_when_stopped({"actor": engine}, parts, rows=[{"em": 0.5}]):
        part["t"] = 0.75  # the step that is stopped has begun to change it
        raise stop
    expected = {"rows": [{"em": 0.5}], "taid": {"t": 0.5}, "actor": {"weight": 0.0}}
    assert checkpoint.load() == expected
    with pytest.raises(stop), checkpoint.saved_when_stopped({"actor": engine}, parts, rows=[]):
        engine.updates = 1
        raise stop
    engine.lockstep = True
    with pytest.raises(stop), checkpoint.saved_when_stopped({"actor": engine}, parts, rows=[]):
        raise stop
    with pytest.raises(ValueError), checkpoint.saved_when_stopped({"actor": engine}, parts, rows=[]):
        raise ValueError
    assert checkpoint.load() == expected


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
