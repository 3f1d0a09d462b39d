"""Updates beside TRL's, for `make bench`: GRPO, PPO, KD and GKD.

Both sides learn from the same episodes, with the same models, losses and AdamW; before anything is timed,
their gradients are compared. A comparison is a process of its own, because the last TRL that has PPO is an
older one, and so is each measurement of memory: `python -m benchmarks.peer_updates KIND EPISODES`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternation import Rounds, alternate
from benchmarks.peer_distill import GKD, KD
from benchmarks.peer_grpo import GRPO
from benchmarks.peer_ppo import PPO
from benchmarks.updates import STUDENT, Update
from dgpo_core.agent.episode import Episode, read_episodes, write_episodes
from dgpo_core.config.params import load_params
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.training.episode_sources import usable
from tasks.stages.inputs import retriever
from tasks.stages.rollouts import split_tasks, training_loop, training_rollout

COMPARISONS = {"GRPO": GRPO, "PPO": PPO, "KD": KD, "GKD": GKD}
PPO_TRL = Path(".venv-trl")  # TRL 1.12.0, the last one with PPOTrainer, where it is installed (`make bench`)
COUNT, ROWS = 64, (8, 64)  # episodes; of a batch of TRL's
RETURNS = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back what is freed: the peak is the tensors'


@dataclass(frozen=True)
class Compared:
    """Times of an update, how far the gradients are apart (of their norm), and peak memory in MiB."""

    rounds: Rounds
    difference: float
    memory: dict[str, float]
    trl: str  # version


def compare(rounds: int, memory: bool = True) -> list[Compared]:
    """Compare every kind of update; without the older TRL there is no PPO. Without `memory` no peaks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episodes.parquet"
        write_episodes(path, sampled(STUDENT, COUNT))
        for kind in COMPARISONS:
            if kind == "PPO" and not PPO_TRL.is_dir():
                print(f"PPO is left out: TRL 1.12.0 is not in {PPO_TRL}", file=sys.stderr)
                continue
            timed = _run(kind, path, "--rounds", str(rounds))
            times = Rounds(f"{kind}'s update of {COUNT} episodes", timed["seconds"], COUNT, "episode")
            names = timed["seconds"] if memory else ()
            peaks = {name: _run(kind, path, "--memory", name)["MiB"] for name in names}
            found.append(Compared(times, timed["difference"], peaks, timed["trl"]))
    return found


def memory_table(found: list[Compared]) -> str:
    """Return a Markdown table of the peaks of memory."""
    lines = ["| peak of an update | contender | MiB | times ours |", "|---|---|---|---|"]
    for one in found:
        ours = one.memory[one.rounds.ours]
        for name, peak in one.memory.items():
            lines.append(f"| {one.rounds.name} | {name} | {peak:.0f} | {peak / ours:.2f} |")
    return "\n".join(lines)


def sampled(source: str, count: int) -> list[Episode]:
    """Return `count` episodes that the model samples, five of a question."""
    params, tokenizer = load_params(), load_tokenizer(source)
    loop = training_loop(params, load_model(source), source, tokenizer, retriever(params))
    rollout = training_rollout(loop, split_tasks(params, "train", 0), params.reinforce.sampling, 0)
    return usable(rollout([question // 5 for question in range(count)], 0))


def contenders(kind: str, episodes: list[Episode]) -> dict[str, Callable[[], Update]]:
    """Return what makes each side of a comparison. The first one is ours."""
    both = COMPARISONS[kind]
    peers = {f"TRL's {both.trainer}, {n} a batch": partial(both.theirs, episodes, n) for n in ROWS}
    return {"ours": partial(both.ours, episodes), **peers}


def time_all(kind: str, episodes: list[Episode], rounds: int) -> dict[str, Any]:
    """Compare the gradients of ours and of TRL's with all episodes in one batch, and time all sides."""
    sides = {name: make() for name, make in contenders(kind, episodes).items()}
    own, *_, whole = (side.gradient() for side in sides.values())
    times = alternate(kind, {name: side.step for name, side in sides.items()}, rounds)
    difference = float((own - whole).norm() / own.norm())
    return {"seconds": times.seconds, "difference": difference, "trl": version("trl")}


def peak_of(kind: str, episodes: list[Episode], name: str) -> dict[str, float]:
    """Measure how far an update's peak is above the memory before it; weights and optimiser are there."""
    side = contenders(kind, episodes)[name]()
    side.step()  # what is allocated once: the optimiser's state, caches
    gc.collect()
    with _peak() as growth:
        side.step()
    return {"MiB": growth[0]}


@contextmanager
def _peak() -> Iterator[list[float]]:
    """Measure how far the process's resident memory rises inside (Linux), MiB."""
    growth: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    yield growth
    growth.append((_resident("VmHWM") - before) / 1024)


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key))


def _run(kind: str, episodes: Path, *options: str) -> dict[str, Any]:
    """Run this module's command in a process of its own and return what it prints."""
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"}
    if kind == "PPO":
        environment["PYTHONPATH"] = os.pathsep.join([str(PPO_TRL), os.environ.get("PYTHONPATH", "")])
    if "--memory" in options:
        environment |= RETURNS
    command = [sys.executable, "-m", "benchmarks.peer_updates", kind, str(episodes), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=COMPARISONS)
    parser.add_argument("episodes", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="measure this contender's memory instead of times")
    given = parser.parse_args()
    torch.manual_seed(0)
    episodes = read_episodes(given.episodes)
    if given.memory:
        print(json.dumps(peak_of(given.kind, episodes, given.memory)))
    else:
        print(json.dumps(time_all(given.kind, episodes, given.rounds)))


if __name__ == "__main__":
    main()
