"""A whole run on a machine: every stage's needs, what does not fit, and which setting makes it fit."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dgpo_core.planning.machine import GIB, Machine
from dgpo_core.planning.stages import PROCESS, Estimate, Planner, in_process

ENVIRONMENT_DISK = 12e9  # bytes of the Python environment with CUDA


@dataclass(frozen=True)
class Problem:
    """Something that does not fit: how much is needed and there (bytes, or GPUs), and what to do about it."""

    stage: str
    what: str
    needed: float
    available: float
    advice: str

    def amount(self, value: float) -> str:
        """`needed` or `available` for people."""
        return f"{value:.0f}" if self.what == "GPUs" else f"{value / GIB:.1f} GiB"


@dataclass(frozen=True)
class Plan:
    stages: list[Estimate]
    problems: list[Problem]
    machine: Machine
    disk: float  # bytes of everything: environment, models, outputs
    assumptions: dict[str, str]

    @property
    def hours(self) -> float | None:
        """One stage after another."""
        known = [stage.seconds for stage in self.stages]
        return None if None in known else sum(s for s in known if s is not None) / 3600

    @property
    def cost(self) -> float | None:
        """All GPUs of the machine are paid while it runs."""
        if self.hours is None or self.machine.price is None:
            return None
        return self.hours * self.machine.price * max(1, self.machine.gpus)

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, FLOPs, seconds; `null` where unknown."""
        return {
            "machine": asdict(self.machine) | {"device": _finite(asdict(self.machine.device))},
            "assumptions": self.assumptions,
            "stages": [asdict(s) | {"device_memory": s.device_memory} for s in self.stages],
            "problems": [asdict(problem) for problem in self.problems],
            "disk": self.disk,
            "hours": self.hours,
            "cost": self.cost,
        }


def make_plan(planner: Planner) -> Plan:
    stages = planner.stages()
    machine, work = planner.machine, planner.work
    problems = [problem for stage in stages for problem in _problems(planner, stage)]
    problems += _too_few(planner)
    disk = ENVIRONMENT_DISK + planner.models_disk() + sum(stage.disk for stage in stages)
    if machine.disk is not None and disk > machine.disk:
        problems.append(Problem("all", "disk", disk, machine.disk, _disk_advice(planner, stages)))
    assumed, setup = machine.assumptions, planner.setup
    engine = "plain torch" if setup.zero is None else f"ZeRO-{setup.zero}"
    assumptions = work.sources | {
        "episodes": f"{work.lengths.source}; {_lengths(planner)}",
        "speed": f"{assumed.efficiency:.0%} of the peak in training and reading, {assumed.decoding:.0%} of "
        f"the memory's bandwidth and {1000 * assumed.launch:g} ms a layer (vLLM: "
        f"{1000 * assumed.scheduling:g} ms) in decoding, {assumed.queries:g} queries a second",
        "spread": f"{setup.processes} training process(es), {engine}; episodes by {setup.engine}",
    }
    return Plan(stages, problems, machine, disk, assumptions)


def _too_few(planner: Planner) -> Iterator[Problem]:
    """Training and the student's servers hold their GPUs at the same time."""
    setup, gpus = planner.setup, planner.machine.gpus
    servers = len(planner.params.rollout.server.student) if setup.engine == "vllm-server" else 0
    if gpus and servers and setup.processes + servers > gpus:
        yield Problem(
            "training",
            "GPUs",
            setup.processes + servers,
            gpus,
            f"compute.processes and URLs of rollout.server.student: together at most {gpus}, unless the "
            "servers are other machines'",
        )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if value == float("inf") else value for key, value in values.items()}


def _lengths(planner: Planner) -> str:
    own = planner.work.lengths
    return (
        f"{own.total:.0f} tokens = {own.prompt:.0f} prompt + {own.model:.0f} of the model in {own.turns:.1f} "
        f"turns + {own.environment:.0f} retrieved"
    )


def _problems(planner: Planner, stage: Estimate) -> Iterator[Problem]:
    machine = planner.machine
    # without a GPU the models are in the host's memory too
    on_host = stage.host + (stage.device_memory - PROCESS if not machine.gpus and stage.memory else 0)
    if machine.gpus and stage.device_memory > machine.device.memory:
        advice = _advice(planner, stage.stage, lambda s: s.device_memory <= machine.device.memory)
        yield Problem(stage.stage, "GPU memory", stage.device_memory, machine.device.memory, advice)
    if machine.memory is not None and on_host > machine.memory:
        advice = (
            "retrieval.location: the URL of a Qdrant server (a cluster, or quantised vectors)"
            if stage.stage == "index" and in_process(planner.params.retrieval)
            else "a smaller retrieval.shard_size"
            if stage.stage == "index"
            else "more memory, or a GPU"
        )
        yield Problem(stage.stage, "host memory", on_host, machine.memory, advice)


def _advice(planner: Planner, stage: str, fits: Callable[[Estimate], bool]) -> str:
    """The first change, in order of its price, with which the stage fits."""
    for text, changed in _changes(planner):
        found = next(s for s in changed.stages() if s.stage == stage)
        if fits(found):
            return text
    return "no setting here makes it fit: GPUs with more memory"


def _changes(planner: Planner) -> Iterator[tuple[str, Planner]]:
    """Smaller passes first (slower by little), then sharing the states among the GPUs, then both."""
    yield from _smaller(planner, "")
    if planner.machine.gpus > 1:
        for zero in (1, 2, 3):
            setup = replace(planner.setup, processes=planner.machine.gpus, zero=zero)
            text = f"training with DeepSpeed, ZeRO-{zero} on {planner.machine.gpus} GPUs"
            shared = replace(planner, setup=setup)
            yield text, shared
            yield from _smaller(shared, f"{text}, and ")


def _smaller(planner: Planner, before: str) -> Iterator[tuple[str, Planner]]:
    """Halved passes, of training and of generation, until one episode is left."""
    sections = {"compute": "micro_batch_tokens", "rollout": "batch_tokens"}
    smallest = planner.params.protocol.max_context
    values = [_halved(getattr(getattr(planner.params, s), key), smallest) for s, key in sections.items()]
    for steps in sorted(
        itertools.product(*map(range, map(len, values))), key=lambda steps: (sum(steps), steps)
    ):
        if not any(steps):
            continue
        update, texts = {}, []
        for (section, key), choices, step in zip(sections.items(), values, steps, strict=True):
            if step:
                update[section] = getattr(planner.params, section).model_copy(update={key: choices[step]})
                texts.append(f"{section}.{key}: {choices[step]}")
        yield before + ", ".join(texts), replace(planner, params=planner.params.model_copy(update=update))


def _halved(value: int, smallest: int) -> list[int]:
    """A setting's value, half of it, and so on."""
    values = [value]
    while values[-1] // 2 >= smallest:
        values.append(values[-1] // 2)
    return values


def _disk_advice(planner: Planner, stages: list[Estimate]) -> str:
    largest = max(stages, key=lambda stage: stage.disk)
    return f"most of it is for {largest.stage} ({largest.disk / 1e9:.0f} GB with DVC's copy)"
