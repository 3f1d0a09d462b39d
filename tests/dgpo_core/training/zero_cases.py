"""Two trainings, and what two processes under DeepSpeed make of them, kept for the tests.

Importing DeepSpeed takes seconds, so one program runs many cases:
`python -m tests.dgpo_core.training.zero_cases <folder> <cases>`.
"""

import contextlib
import copy
import os
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.multiprocessing as mp
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.episode import Episode
from dgpo_core.config.recipes import Distillation, Reinforcement
from dgpo_core.config.training import ComputeConfig, DistillConfig, LoraConfig, ReinforceConfig, WatchConfig
from dgpo_core.errors import NotFinite
from dgpo_core.models import add_adapters, merged
from dgpo_core.training import parallel
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.training.distill import Distiller
from dgpo_core.training.episode_sources import TeacherEpisodes
from dgpo_core.training.reinforce import Reinforcer
from dgpo_core.training.watch import Watch
from dgpo_core.world.pretraining import build_tokenizer
from tests.dgpo_core.making import distillation, exact, random_episode, reinforcement, tiny_model

EPISODES = [random_episode(seed) for seed in range(14)]
IDS = torch.tensor([[5, 6, 7, 8]])
KD = distillation()
DGPO = reinforcement(placement="loss", divergence="reverse_kl", weight=0.5)


def compute(**changes: Any) -> ComputeConfig:
    """Small micro-batches: several for each process, and an uneven number of them."""
    return exact(60, **changes)


FIRST = {f"zero{stage}": compute(engine="deepspeed", zero_stage=stage) for stage in (1, 2, 3)}
FIRST["zero3"] = FIRST["zero3"].model_copy(update={"split_teacher": True, "gradient_checkpointing": True})
OFFLOADED = compute(engine="deepspeed", zero_stage=2, offload=True)
NARROW = {f"bfloat16-{n}": c.model_copy(update={"precision": "bfloat16"}) for n, c in FIRST.items()}
NARROW["bfloat16"] = compute(precision="bfloat16")
ADAPTED = {"lora": compute(lora=LoraConfig(rank=4))}
ADAPTED["lora-zero3"] = FIRST["zero3"].model_copy(update={"lora": LoraConfig(rank=4)})


def distilled(
    tokenizer: PreTrainedTokenizerFast, folder: Path, config: ComputeConfig, recipe: Distillation = KD
) -> dict[str, Any]:
    """Six steps on the teacher's live distributions; `seen` is what the student's rollouts would see."""
    student, teacher = tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)
    if config.lora:
        add_adapters(student, config.lora, 0)
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    settings = DistillConfig(epochs=2, batch_size=5, learning_rate=1e-3)
    source = TeacherEpisodes(EPISODES, settings, 3)
    seen: list[torch.Tensor] = []

    def look() -> float:
        with torch.inference_mode():
            seen.append(student(IDS).logits.float())
        return 0.5

    made = Distiller(student, teacher, recipe, settings, config, source)
    rows = made.train(Checkpoint(folder), look, lambda *_: None)
    return {"rows": rows, "seen": seen, "weights": merged(student).state_dict()}


def reinforced(
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    config: ComputeConfig,
    kill_at: int | None = None,
    recipe: Reinforcement = DGPO,
    overlap: bool = False,
) -> dict[str, Any]:
    """Four steps; of PPO with the KL of wrong episodes over the whole vocabulary as a term of the loss."""
    settings = ReinforceConfig(
        steps=4, batch_size=8, mini_batch_size=4, group_size=4, actor_learning_rate=1e-3,
        critic_learning_rate=1e-3, entropy_weight=0.01, checkpoint_every=2,
        overlap=overlap, importance_cap=2.0 if overlap else None,
    )  # fmt: skip
    student = tiny_model(tokenizer, 1)
    sampler = copy.deepcopy(student) if overlap else None
    teacher, group = tiny_model(tokenizer, 2), parallel.further_group()
    trainer = Reinforcer(student, teacher, recipe, settings, config, 3, sampler=sampler)

    def rollout(chosen: list[int], step: int) -> list[Episode]:
        own = parallel.share(range(len(chosen)))
        return parallel.gather([random_episode(100 * step + place) for place in own], group)

    def report(_: int, rows: list[Any]) -> None:
        if len(rows) == kill_at:
            raise KeyboardInterrupt

    rows = trainer.train(20, rollout, Checkpoint(folder), lambda: 0.5, report)
    return {"rows": rows, "weights": student.state_dict()}


def resumed(tokenizer: PreTrainedTokenizerFast, folder: Path, config: ComputeConfig) -> dict[str, Any]:
    """Killed at step 3, continued."""
    with contextlib.suppress(KeyboardInterrupt):
        reinforced(tokenizer, folder, config, kill_at=3)
    return reinforced(tokenizer, folder, config)


def first(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """Every stage of ZeRO in float32: both trainings, and one of them killed and continued."""
    results = {}
    for name, config in FIRST.items():
        results[f"distill-{name}"] = distilled(tokenizer, folder / f"distill-{name}", config)
        results[f"reinforce-{name}"] = reinforced(tokenizer, folder / f"reinforce-{name}", config)
        results[f"resumed-{name}"] = resumed(tokenizer, folder / f"resumed-{name}", config)
    return results


def more(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """Other precisions, places and weights; and half a training for another number of processes."""
    cases = {"offload": OFFLOADED} | NARROW | ADAPTED
    results = {f"distill-{n}": distilled(tokenizer, folder / n, config) for n, config in cases.items()}
    with contextlib.suppress(KeyboardInterrupt):
        reinforced(tokenizer, folder / "two", FIRST["zero3"], kill_at=3)
    return results


def diverging(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """What a learning rate that is far too high ends with."""
    settings = DistillConfig(epochs=2, batch_size=5, learning_rate=1e30, max_grad_norm=1e30)
    results = {}
    for name, config in (FIRST | {"bfloat16": NARROW["bfloat16-zero2"]}).items():
        recipe, source = distillation(), TeacherEpisodes(EPISODES, settings, 3)
        student, teacher = tiny_model(tokenizer, 1), tiny_model(tokenizer, 2)
        watch = Watch(WatchConfig(max_bad_steps=1))
        made = Distiller(student, teacher, recipe, settings, config, source, watch=watch)
        try:
            made.train(Checkpoint(folder / f"diverging-{name}"), lambda: 0.5, lambda *_: None)
        except NotFinite as error:
            results[name] = str(error)
    return results


def run(rank: int, folder: Path, cases: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with parallel.group("cpu"):
        results = {"first": first, "more": more, "diverging": diverging}[cases](build_tokenizer(), folder)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    import dgpo_core.training.deepspeed_engine  # noqa: F401  before the fork: once for both

    torch.set_num_threads(1)
    forked, made, which = mp.get_context("fork"), Path(sys.argv[1]), sys.argv[2]
    workers = [forked.Process(target=run, args=(rank, made, which)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
