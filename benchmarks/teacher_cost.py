"""What the teacher costs: a step of DGPO over the same step without one, `python -m benchmarks.teacher_cost`.

The paper's sizes, a student of 0.5B with its critic and a teacher of 3B, with widths and layers shrunk alike,
so that every part keeps its share (benchmarks/dgpo_step.py), and episodes of random tokens of which a given
share is wrong. Rollouts are those of the default engine, which writes every turn at its length. All steps,
and the rollouts, take turns; a ratio is that of one round. Beside it stands what `dgpo plan` says of the true
sizes. Writes its table into docs/benchmarks.md.
"""

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.alternation import Rounds, alternate, fill
from benchmarks.dgpo_step import Settings, make_episodes, make_trainers, random_model, roll_out
from dgpo_core.agent.episode import Episode
from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.recipes import Reinforcement
from dgpo_core.config.training import ComputeConfig, ReinforceConfig
from dgpo_core.planning.estimate import Planner
from dgpo_core.planning.shapes import Architecture, table
from dgpo_core.planning.workload import Machine, Workload, assumed, device_of, expected_counts
from dgpo_core.threads import single_threaded
from dgpo_core.training.reinforce import ExperienceMaker, Updater

SHARES = (0.0, 0.25, 0.5, 0.65, 0.75, 1.0)
ROLLOUTS, ALONE = "rollouts", "no teacher"
NO_TEACHER = Reinforcement(start="student", algorithm="ppo", guidance="none", reference="none")
SMALL = Settings(
    episodes=16,
    mini_batch=8,
    micro_batch_tokens=512,
    device="cpu",
    precision="float32",
    shrink=4,
    scale=0.125,
)
PROFILE = Path("profiles/paper-qwen-3b.yaml")


def measure(settings: Settings, rounds: int) -> Rounds:
    """Time steps of every share of wrong episodes, the step without a teacher, and the rollouts."""
    student, teacher = (random_model(name, settings) for name in (settings.student, settings.teacher))
    audit = -(-settings.episodes * ReinforceConfig().audit_episodes // ReinforceConfig().batch_size)
    config = ReinforceConfig(
        batch_size=settings.episodes, mini_batch_size=settings.mini_batch, audit_episodes=audit
    )
    compute = ComputeConfig.model_validate(
        {key: getattr(settings, key) for key in ("device", "precision", "micro_batch_tokens")}
    )
    maker, updater = make_trainers(student, teacher, config, compute)
    episodes = {
        share: make_episodes(replace(settings, wrong=share), student.config.vocab_size) for share in SHARES
    }
    alone = replace(maker, recipe=NO_TEACHER, reference=None)
    contenders = {ALONE: partial(step, alone, updater, episodes[0.0])}
    contenders |= {f"{share:.0%}": partial(step, maker, updater, own) for share, own in episodes.items()}
    with single_threaded():
        rollout = partial(roll_out, settings, student, episodes[0.0])
        return alternate("a step of DGPO", {**contenders, ROLLOUTS: rollout}, rounds)


def step(maker: ExperienceMaker, updater: Updater, episodes: list[Episode]) -> None:
    updater.update(maker.make(episodes), list(range(len(episodes))))


def planned(share: float, engine: str) -> float:
    """Return the same ratio by `dgpo plan`, on one H100 with this engine."""
    content: dict[str, Any] = resolve_profile(PROFILE)
    content |= {"compute": {"processes": 1}, "rollout": {"engine": engine}}
    content["recipes"]["reinforce"]["alone"] = NO_TEACHER.model_dump()
    params = Params.model_validate(content)
    student, teacher = (
        Architecture.from_config(table()[name]["config"]) for name in (SMALL.student, SMALL.teacher)
    )
    train, test, passages = expected_counts(params)
    lengths = assumed(params.protocol, params.retrieval.top_k)
    work = Workload(train, test, passages, 100, lengths, 1.0, share, {})
    plan = Planner(params, student, teacher, None, work, Machine(1, device_of("h100")))
    seconds = {stage.stage: stage.seconds for stage in plan.stages()}
    return seconds["reinforce@dgpo"] / seconds["reinforce@alone"]


def report(rounds: Rounds) -> str:
    """Return a row for each share of wrong episodes."""
    rollouts, alone = rounds.seconds[ROLLOUTS], rounds.seconds[ALONE]
    lines = [
        "| wrong | without rollouts | with: median (least to greatest) | plan, transformers | plan, vLLM |",
        "|---|---|---|---|---|",
    ]
    for share in SHARES:
        own = rounds.seconds[f"{share:.0%}"]
        update = statistics.median(b / a for a, b in zip(alone, own, strict=True))
        whole = sorted((r + b) / (r + a) for r, a, b in zip(rollouts, alone, own, strict=True))
        plans = " | ".join(f"{planned(share, engine):.2f}" for engine in ("transformers", "vllm"))
        lines.append(
            f"| {share:.0%} | {update:.2f} | **{statistics.median(whole):.2f}** "
            f"({whole[0]:.2f} to {whole[-1]:.2f}) | {plans} |"
        )
    part = statistics.median(r / (r + a) for r, a in zip(rollouts, alone, strict=True))
    lines += [
        "",
        f"{torch.get_num_threads()} threads; rollouts are {part:.0%} of the step without a teacher.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    text = report(measure(SMALL, parser.parse_args().rounds))
    print(text)
    fill("teacher", text)


if __name__ == "__main__":
    main()
