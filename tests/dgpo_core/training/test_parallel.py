"""Two processes train as one does: same losses, same weights, to rounding."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import PreTrainedTokenizerFast

from dgpo_core.config.training import DistillConfig, ReinforceConfig
from dgpo_core.errors import NotFinite
from dgpo_core.training import parallel
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.reinforce import Reinforcer
from tests.dgpo_core.making import distillation, exact, random_episode, reinforcement, tiny_model

pytestmark = pytest.mark.thorough

# small micro-batches: several for each process, and an uneven number of them
COMPUTE = exact(60)
EPISODES = [random_episode(seed) for seed in range(14)]


def distilled(tokenizer: PreTrainedTokenizerFast, folder: Path, variant: str) -> dict[str, Any]:
    config = DistillConfig(epochs=2, batch_size=5, learning_rate=1e-3)
    recipe = distillation(variant)
    student, source = tiny_model(tokenizer, 1), TeacherEpisodes(EPISODES, config, 3)
    made = Distiller(student, tiny_model(tokenizer, 2), recipe, config, COMPUTE, source)
    rows = made.train(Checkpoint(folder), lambda: 0.5, lambda *_: None)
    return {"rows": rows, "weights": student.state_dict()}


def reinforced(tokenizer: PreTrainedTokenizerFast, folder: Path, variant: str) -> dict[str, Any]:
    config = ReinforceConfig(
        steps=3, batch_size=8, mini_batch_size=4, group_size=4, actor_learning_rate=1e-3,
        critic_learning_rate=1e-3, entropy_weight=0.01,
    )  # fmt: skip
    recipe = reinforcement(variant)
    student = tiny_model(tokenizer, 1)
    trainer = Reinforcer(student, tiny_model(tokenizer, 2), recipe, config, COMPUTE, 3)

    def rollout(chosen: list[int], step: int) -> list[Any]:
        own = [random_episode(100 * step + place) for place in parallel.share(range(len(chosen)))]
        return parallel.gather(own)

    rows = trainer.train(20, rollout, Checkpoint(folder), lambda: 0.5, lambda *_: None)
    return {"rows": rows, "weights": student.state_dict()}


CASES = {"distill": (distilled, "kd"), "taid": (distilled, "taid"), "ppo": (reinforced, "ppo")}
CASES["grpo"] = (reinforced, "grpo")


def one_of_two(rank: int, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for name, (train, variant) in CASES.items():
        results[name] = train(tokenizer, folder / f"{name}-{rank}", variant)
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
    made = Distiller(student, teacher, recipe, config, COMPUTE, TeacherEpisodes(EPISODES, config, 3))
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


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(
    name: str, both: list[Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    train, variant = CASES[name]
    alone = train(tokenizer, tmp_path, variant)
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
    assert both[0]["diverging"] == both[1]["diverging"]
    assert both[0]["diverging"].startswith("the loss of step 1 is not a number; lower distill.learning_rate")


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
