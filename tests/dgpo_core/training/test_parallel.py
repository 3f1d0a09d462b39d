"""Two processes train as one does: same losses, same weights, to rounding."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import PreTrainedTokenizerFast

from dgpo_core.config.training import DistillConfig
from dgpo_core.errors import NotFinite
from dgpo_core.training import parallel
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from tests.dgpo_core.making import distillation, reinforcement, tiny_model
from tests.dgpo_core.training.zero_cases import EPISODES, compute, distilled, reinforced

pytestmark = pytest.mark.thorough

TRAININGS: dict[str, Callable[..., dict[str, Any]]] = {
    "kd": distilled,
    "taid": partial(distilled, recipe=distillation("taid")),
    "ppo": reinforced,
    "grpo": partial(reinforced, recipe=reinforcement("grpo")),
    "overlap": partial(reinforced, overlap=True),
}


def one_of_two(rank: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, train in TRAININGS.items():
        results[name] = train(tokenizer, folder / f"{name}-{rank}", compute())
    results["unused"] = unused_parameter()
    results["diverging"] = diverging(tokenizer, folder / f"diverging-{rank}")
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def diverging(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """What a training ends with of which one process's share alone has a loss that is no number."""
    student, teacher = tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)
    if parallel.rank() == 1:
        with torch.no_grad():
            next(teacher.parameters())[7, 7] = torch.nan
    config, recipe = DistillConfig(batch_size=14), distillation()
    made = Distiller(student, teacher, recipe, config, compute(), TeacherEpisodes(EPISODES, config, 3))
    with pytest.raises(NotFinite) as caught:
        made.train(Checkpoint(folder), lambda: 0.5, lambda *_: None)
    return str(caught.value)


def unused_parameter() -> list[torch.Tensor | None]:
    """Gradients of a weight that only the first process used, and of one that none did."""
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
    if parallel.rank() == 0:
        layers[0](torch.tensor([1.0, 3.0])).sum().backward()
    parallel.add_gradients(layers)
    return [parameter.grad for parameter in layers.parameters()]


@pytest.fixture(scope="module")
def both(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes has after every case."""
    folder = tmp_path_factory.mktemp("two")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # names of machines need not resolve
    mp.spawn(one_of_two, (tokenizer, folder), nprocs=2)  # type: ignore
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_as_one(
    name: str, both: list[Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    alone = TRAININGS[name](tokenizer, tmp_path, compute())
    first, second = (results[name] for results in both)
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key])  # they never drift apart
        torch.testing.assert_close(value, alone["weights"][key], rtol=1e-3, atol=1e-5)
    assert first["rows"] == second["rows"]
    for row, expected in zip(first["rows"], alone["rows"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    before = tiny_model(tokenizer, 1).state_dict()
    assert any(not torch.allclose(v, alone["weights"][k], atol=1e-3) for k, v in before.items())


def test_a_loss_that_is_no_number_in_one_process_ends_both(both: list[Any]) -> None:
    """Both drop the same steps, and end after as many as may be dropped in a row."""
    assert both[0]["diverging"] == both[1]["diverging"]
    assert both[0]["diverging"].startswith("the loss of step 3 is not a number; lower distill.learning_rate")


def test_a_parameter_that_no_process_used_keeps_no_gradient(both: list[Any]) -> None:
    for results in both:
        used, unused = results["unused"]
        assert torch.equal(used, torch.tensor([[1.0, 3.0], [1.0, 3.0]]))
        assert unused is None


@pytest.mark.parametrize("items", [[], [1], [1, 2, 3, 4, 5]])
def test_one_process_has_everything(items: list[int]) -> None:
    assert parallel.gather(parallel.share(items)) == items
    assert parallel.all_sum({"loss": 1.5}) == {"loss": 1.5}
    assert (parallel.rank(), parallel.processes()) == (0, 1)
