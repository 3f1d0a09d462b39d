"""A whole run on a machine: every stage's needs, what does not fit, and which setting makes it fit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dgpo_core.config.params import Params
from dgpo_core.planning.estimate import PROCESS, Planner, StageCost, in_process, servers
from dgpo_core.planning.shapes import zero_stage
from dgpo_core.planning.workload import GIB, Machine

Settings = dict[str, Any]  # `section.key` -> value
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
        """Write `needed` or `available` for people."""
        return f"{value:.0f}" if self.what == "GPUs" else f"{value / GIB:.1f} GiB"


@dataclass(frozen=True)
class Plan:
    """`disk`: bytes of everything, environment, models and outputs; `server`: beside the stages, perhaps on
    another machine (Planner.server)."""

    machine: Machine
    assumptions: dict[str, str]
    stages: list[StageCost]
    problems: list[Problem]
    disk: float
    server: dict[str, float] | None

    @property
    def hours(self) -> float:
        """One stage after another; nan where unknown."""
        return sum(stage.seconds for stage in self.stages) / 3600

    @property
    def cost(self) -> float:
        """All GPUs of the machine are paid while it runs; nan where unknown."""
        return self.hours * self.machine.price * max(1, self.machine.gpus)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: bytes, FLOPs, seconds; None where unknown or without end."""
        content = asdict(self) | {"hours": self.hours, "cost": self.cost}
        for row, stage in zip(content["stages"], self.stages, strict=True):
            row["device_memory"] = stage.device_memory
        finite: dict[str, Any] = _finite(content)
        return finite


def _finite(value: Any) -> Any:
    """Put None for nan and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_plan(planner: Planner) -> Plan:
    """Estimate all stages, and say what does not fit and on which assumptions this rests."""
    stages, compute, own = planner.stages(), planner.params.compute, planner.work.lengths
    disk = ENVIRONMENT_DISK + planner.models_disk() + sum(stage.disk for stage in stages)
    assumed, zero = planner.machine.assumptions, zero_stage(compute)
    assumptions = planner.work.sources | {
        "episodes": f"{own.source}; {own.total:.0f} tokens = {own.prompt:.0f} prompt + {own.model:.0f} of "
        f"the model in {own.turns:.1f} turns + {own.environment:.0f} retrieved",
        "speed": f"{assumed.efficiency:.0%} of the peak in training and reading, {assumed.decoding:.0%} of "
        f"the memory's bandwidth and {1000 * assumed.launch:g} ms a layer (vLLM: "
        f"{1000 * assumed.scheduling:g} ms) in decoding, {assumed.queries:g} queries a second",
        "spread": f"{compute.processes} training process(es), "
        f"{'plain torch' if zero is None else f'ZeRO-{zero}'}; episodes by {planner.params.rollout.engine}",
    }
    problems = list(_problems(planner, stages, disk))
    return Plan(planner.machine, assumptions, stages, problems, disk, planner.server())


def _problems(planner: Planner, stages: list[StageCost], disk: float) -> Iterator[Problem]:
    machine, params = planner.machine, planner.params
    available = machine.device.memory if machine.gpus else math.inf
    advice = _advice(planner, {stage.stage for stage in stages if stage.device_memory > available})
    on_host = "more memory, or a GPU"
    index = "a smaller retrieval.shard_size"
    if in_process(params.retrieval):
        index = "retrieval.location: the URL of a Qdrant server (a cluster, or quantised vectors)"
    for stage in stages:
        name, needed = stage.stage, stage.device_memory
        if name in advice:
            yield Problem(name, "GPU memory", needed, available, advice[name])
        # without a GPU the models are in the host's memory too
        host = stage.host + (needed - PROCESS if not machine.gpus and stage.memory else 0)
        if host > machine.memory:
            yield Problem(name, "host memory", host, machine.memory, index if name == "index" else on_host)
    # training and the student's servers hold their GPUs at the same time
    processes, gpus = params.compute.processes + servers(params), machine.gpus
    if gpus and servers(params) and processes > gpus:
        text = f"compute.processes and URLs of rollout.server.student: together at most {gpus}, unless the "
        yield Problem("training", "GPUs", processes, gpus, text + "servers are other machines'")
    if disk > machine.disk:
        largest = max(stages, key=lambda stage: stage.disk)
        text = f"most of it is for {largest.stage} ({largest.disk / 1e9:.0f} GB with DVC's copy)"
        yield Problem("all", "disk", disk, machine.disk, text)


def _advice(planner: Planner, large: set[str]) -> dict[str, str]:
    """Find for each stage of `large` the cheapest change of the settings with which it fits its GPUs."""
    advice: dict[str, str] = {}
    for settings in _changes(planner.params, planner.machine.gpus) if large else ():
        content = planner.params.model_dump()
        for name, value in settings.items():
            section, key = name.split(".")
            content[section][key] = value
        try:
            changed = replace(planner, params=Params.model_validate(content))
        except ValueError:  # these do not go together
            continue
        fitting = {s.stage for s in changed.stages() if s.device_memory <= planner.machine.device.memory}
        text = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in settings.items())
        advice |= dict.fromkeys((fitting & large) - advice.keys(), text)
        if advice.keys() == large:
            break
    return dict.fromkeys(large, "no setting here makes it fit: GPUs with more memory") | advice


def _changes(params: Params, gpus: int) -> Iterator[Settings]:
    """List changes in the order of their price, each alone and then with smaller passes: none; a third
    slower; shared among the GPUs that no server holds; with weights that travel in every pass; with an
    optimiser on the host. Not adapters: they train other weights, and save less than these."""
    processes = max(1, gpus - servers(params))
    again = {"compute.gradient_checkpointing": True}
    split, offload = {"compute.split_teacher": True}, {"compute.offload": True}
    zero: list[Settings] = [
        {"compute.processes": processes, "compute.engine": "deepspeed", "compute.zero_stage": stage}
        for stage in (1, 2, 3)
    ]
    changes: list[Settings] = [{}, again]
    if processes > 1:
        changes += [stage | more for stage in zero for more in ({}, again)] + [zero[2] | split | again]
    if gpus:
        changes.append(zero[1] | offload | again)
    if gpus and processes > 1:
        changes.append(zero[2] | split | offload | again)
    for change in changes:
        yield from (change | smaller for smaller in ({}, *_smaller(params)) if change | smaller)


def _smaller(params: Params) -> Iterator[Settings]:
    """Halve passes of training, until one episode is left; of generation the slots, and then its passes."""

    def halved(value: int, least: int) -> list[int]:
        values = [value]
        while values[-1] // 2 >= least:
            values.append(values[-1] // 2)
        return values

    rollout, longest = params.rollout, params.protocol.max_context
    training: list[Settings] = [
        {"compute.micro_batch_tokens": n} for n in halved(params.compute.micro_batch_tokens, longest)
    ]
    slots = halved(rollout.slots, 1)
    generation: list[Settings] = [{"rollout.slots": n} for n in slots]
    fewest: Settings = generation[-1] if len(slots) > 1 else {}
    generation[0] = training[0] = {}  # as it is
    generation += [fewest | {"rollout.batch_tokens": n} for n in halved(rollout.batch_tokens, longest)[1:]]
    steps = itertools.product(range(len(training)), range(len(generation)))
    for first, second in sorted(steps, key=lambda steps: (sum(steps), steps)):
        if first or second:
            yield training[first] | generation[second]
