"""Two processes under DeepSpeed against one with plain torch."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dgpo_core.config.training import LoraConfig
from tests.conftest import ROOT, free_port
from tests.dgpo_core.making import tiny_model
from tests.dgpo_core.training.zero_cases import FIRST, compute, distilled, reinforced

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (`make test-deepspeed`)"
)
TRAININGS: dict[str, Callable[..., dict[str, Any]]] = {"distill": distilled, "reinforce": reinforced}


def two_processes(folder: Path, cases: str) -> list[dict[str, Any]]:
    """What each of them has left in `folder`, beside checkpoints."""
    where = {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), **where}
    command = [sys.executable, "-m", "tests.dgpo_core.training.zero_cases", str(folder), cases]
    subprocess.run(command, check=True, cwd=folder, env=environment)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(tmp_path_factory.mktemp("zero"), "first")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("more")


@pytest.fixture(scope="module")
def more(folder: Path) -> list[dict[str, Any]]:
    return two_processes(folder, "more")


@pytest.fixture(scope="module")
def alone(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process with plain torch makes of the trainings."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train(tokenizer, folder / name, compute()) for name, train in TRAININGS.items()}


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-3) -> None:
    """Losses and weights, to rounding."""
    assert len(found["rows"]) == len(expected["rows"])
    for row, other in zip(found["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(other, rel=tolerance, abs=1e-5)
    for name, value in expected["weights"].items():
        assert found["weights"][name].dtype == torch.float32
        torch.testing.assert_close(found["weights"][name], value, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("stage", FIRST)
def test_split_training_is_that_of_one_process(
    both: list[Any], alone: dict[str, Any], stage: str, training: str
) -> None:
    first, second = (results[f"{training}-{stage}"] for results in both)
    assert first["rows"] == second["rows"]
    assert all(torch.equal(second["weights"][name], value) for name, value in first["weights"].items())
    same(first, alone[training])


def test_training_moved_the_weights(alone: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    before = tiny_model(tokenizer, 1).state_dict()
    for name in TRAININGS:
        weights = alone[name]["weights"]
        assert any(not torch.allclose(value, weights[key], atol=1e-3) for key, value in before.items())


@pytest.mark.parametrize("stage", FIRST)
def test_rollouts_see_the_trained_weights(both: list[Any], alone: dict[str, Any], stage: str) -> None:
    looks = both[0][f"distill-{stage}"]["seen"]
    assert len(looks) == 2
    for look, expected in zip(looks, alone["distill"]["seen"], strict=True):
        torch.testing.assert_close(look, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stage", FIRST)
def test_resumed_training_is_bit_identical(both: list[Any], stage: str) -> None:
    for results in both:
        whole, again = results[f"reinforce-{stage}"], results[f"resumed-{stage}"]
        assert again["rows"] == whole["rows"]
        assert all(torch.equal(again["weights"][name], value) for name, value in whole["weights"].items())


@pytest.mark.slow
@pytest.mark.usefixtures("more")
def test_other_number_of_processes_goes_on(folder: Path, both: list[Any]) -> None:
    """The checkpoint of two processes, continued by one under another stage."""
    code = (
        "import sys; from pathlib import Path; import torch\n"
        "from tests.dgpo_core.training import zero_cases as z\n"
        "with z.parallel.group('cpu'):\n"
        "    made = z.reinforced(z.build_tokenizer(), Path('two'), z.FIRST['zero1'])\n"
        "torch.save(made, 'one.pt')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment)
    found = torch.load(folder / "one.pt", weights_only=False)
    whole = both[0]["reinforce-zero3"]
    assert found["rows"][:2] == whole["rows"][:2]
    same(found, whole)


@pytest.mark.slow
def test_optimiser_state_in_the_hosts_memory(more: list[Any], alone: dict[str, Any]) -> None:
    same(more[0]["distill-offload"], alone["distill"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", FIRST)
def test_bfloat16_has_float32_masters(more: list[Any], alone: dict[str, Any], stage: str) -> None:
    """Losses are those of autocast over float32 weights to bfloat16's rounding, weights nearly."""
    found, torchs = more[0][f"distill-bfloat16-{stage}"], more[0]["distill-bfloat16"]
    for row, other in zip(found["rows"], torchs["rows"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=0.02)
    start = alone["distill"]["weights"]
    for name, value in found["weights"].items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, value.bfloat16().float()) or value.ndim < 2
        assert (value - torchs["weights"][name]).abs().mean() < 0.2 * 6e-3  # six steps of 1e-3
        assert value.shape == start[name].shape


@pytest.mark.slow
def test_adapters(more: list[Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Split over two processes or in one, adapters end in the same ordinary model."""
    alone = distilled(tokenizer, tmp_path, compute(lora=LoraConfig(rank=4)))
    for name in ("lora", "lora-zero3"):
        same(more[0][f"distill-{name}"], alone)
    before = tiny_model(tokenizer, 1).state_dict()
    moved = {k for k, v in alone["weights"].items() if not torch.equal(v, before[k])}
    assert alone["weights"].keys() == before.keys()
    assert moved and all(".layers." in name and name.endswith("proj.weight") for name in moved)


def test_a_training_that_diverges_ends_in_all_processes(tmp_path: Path) -> None:
    """With the same words: at the step whose loss is no number, or whose gradient was none before it."""
    first, second = two_processes(tmp_path, "diverging")
    assert first == second and set(first) == {*FIRST, "bfloat16"}
    for said in first.values():
        assert re.match(r"the (loss|grad_norm) of step [12] is .*; lower distill\.learning_rate", said)
    assert not list(tmp_path.glob("*/checkpoints/*"))
