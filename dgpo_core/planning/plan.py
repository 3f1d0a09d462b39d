"""A whole run on a machine: every stage's needs, what does not fit, and which setting makes it fit."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from dgpo_core.config.params import Params
from dgpo_core.planning.holding import zero_stage
from dgpo_core.planning.machine import GIB, Machine
from dgpo_core.planning.server import Server
from dgpo_core.planning.stages import PROCESS, Estimate, Planner, in_process

Settings = dict[str, Any]  # of one section
Sections = dict[str, Settings]
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
    server: Server | None = None  # beside the stages, perhaps on another machine

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
            "server": asdict(self.server) if self.server else None,
            "hours": self.hours,
            "cost": self.cost,
        }


def make_plan(planner: Planner) -> Plan:
    stages = planner.stages()
    machine, work = planner.machine, planner.work
    choices = Choices(planner)
    problems = [problem for stage in stages for problem in _problems(planner, stage, choices)]
    problems += _too_few(planner)
    disk = ENVIRONMENT_DISK + planner.models_disk() + sum(stage.disk for stage in stages)
    if machine.disk is not None and disk > machine.disk:
        problems.append(Problem("all", "disk", disk, machine.disk, _disk_advice(planner, stages)))
    assumed, compute = machine.assumptions, planner.params.compute
    zero = zero_stage(compute)
    engine = "plain torch" if zero is None else f"ZeRO-{zero}"
    assumptions = work.sources | {
        "episodes": f"{work.lengths.source}; {_lengths(planner)}",
        "speed": f"{assumed.efficiency:.0%} of the peak in training and reading, {assumed.decoding:.0%} of "
        f"the memory's bandwidth and {1000 * assumed.launch:g} ms a layer (vLLM: "
        f"{1000 * assumed.scheduling:g} ms) in decoding, {assumed.queries:g} queries a second",
        "spread": f"{compute.processes} training process(es), {engine}; episodes by "
        f"{planner.params.rollout.engine}",
    }
    return Plan(stages, problems, machine, disk, assumptions, planner.server())


def _too_few(planner: Planner) -> Iterator[Problem]:
    """Training and the student's servers hold their GPUs at the same time."""
    params, gpus = planner.params, planner.machine.gpus
    processes, servers = params.compute.processes, _servers(params)
    if gpus and servers and processes + servers > gpus:
        yield Problem(
            "training",
            "GPUs",
            processes + servers,
            gpus,
            f"compute.processes and URLs of rollout.server.student: together at most {gpus}, unless the "
            "servers are other machines'",
        )


def _servers(params: Params) -> int:
    """GPUs that the student's servers hold during training."""
    return len(params.rollout.server.student) if params.rollout.engine == "vllm-server" else 0


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if value == float("inf") else value for key, value in values.items()}


def _lengths(planner: Planner) -> str:
    own = planner.work.lengths
    return (
        f"{own.total:.0f} tokens = {own.prompt:.0f} prompt + {own.model:.0f} of the model in {own.turns:.1f} "
        f"turns + {own.environment:.0f} retrieved"
    )


def _problems(planner: Planner, stage: Estimate, choices: "Choices") -> Iterator[Problem]:
    machine = planner.machine
    # without a GPU the models are in the host's memory too
    on_host = stage.host + (stage.device_memory - PROCESS if not machine.gpus and stage.memory else 0)
    if machine.gpus and stage.device_memory > machine.device.memory:
        advice = choices.advice(stage.stage, machine.device.memory)
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


class Choices:
    """Changes of the settings, in order of their price; each is estimated once for all stages."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    @cached_property
    def _estimates(self) -> list[tuple[Sections, dict[str, Estimate]]]:
        changes = list(_changes(self._planner.params, self._planner.machine.gpus))
        changed = [_changed(self._planner, sections) for sections in changes]
        return [(c, {s.stage: s for s in p.stages()}) for c, p in zip(changes, changed, strict=True)]

    def advice(self, stage: str, memory: float) -> str:
        """The first change with which the stage fits into `memory` (bytes) of each GPU."""
        for sections, stages in self._estimates:
            fits = stages[stage].device_memory <= memory
            if fits and _possible(_changed(self._planner, sections).params):
                return ", ".join(
                    f"{section}.{key}: {_text(value)}"
                    for section, values in sections.items()
                    for key, value in values.items()
                )
        return "no setting here makes it fit: GPUs with more memory"


def _changed(planner: Planner, sections: Sections) -> Planner:
    update = {name: getattr(planner.params, name).model_copy(update=v) for name, v in sections.items()}
    return replace(planner, params=planner.params.model_copy(update=update))


def _possible(params: Params) -> bool:
    """Whether the settings go together."""
    try:
        Params.model_validate(params.model_dump())
    except ValueError:
        return False
    return True


def _text(value: Any) -> str:
    """As in params.yaml."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _changes(params: Params, gpus: int) -> Iterator[Sections]:
    """Settings of `compute`, each alone and then with smaller passes."""
    for number, compute in enumerate(_computes(params, gpus)):
        base: Sections = {"compute": compute} if compute else {}
        if number:
            yield base
        for smaller in _smaller(params):
            both = compute | smaller.get("compute", {})
            yield base | smaller | ({"compute": both} if both else {})


def _computes(params: Params, gpus: int) -> Iterator[Settings]:
    """As it is; a third slower; shared among the GPUs that no server holds; with weights that travel in every
    pass; with an optimiser on the host. Not adapters: they train other weights, and save less than these."""
    again: Settings = {"gradient_checkpointing": True}
    processes = max(1, gpus - _servers(params))
    zero = {n: {"processes": processes, "engine": "deepspeed", "zero_stage": n} for n in (1, 2, 3)}
    yield {}
    yield again
    if processes > 1:
        for settings in zero.values():
            yield settings
            yield settings | again
        yield zero[3] | {"split_teacher": True} | again
    if gpus:
        yield zero[2] | {"offload": True} | again
        if processes > 1:
            yield zero[3] | {"split_teacher": True, "offload": True} | again


def _smaller(params: Params) -> Iterator[Sections]:
    """Halved passes of training, until one episode is left; of generation less that is kept between turns,
    then nothing, and then halved passes too."""
    smallest, rollout = params.protocol.max_context, params.rollout
    training = _halved(params.compute.micro_batch_tokens, smallest)
    batches = _halved(rollout.batch_tokens, smallest)
    keeping = [*_halved(rollout.kept_tokens, smallest), 0] if rollout.kept_tokens else [0]
    generation: list[Settings] = [{"kept_tokens": tokens} for tokens in keeping]
    generation += [{"kept_tokens": 0, "batch_tokens": tokens} for tokens in batches[1:]]
    steps = itertools.product(range(len(training)), range(len(generation)))
    for first, second in sorted(steps, key=lambda steps: (sum(steps), steps)):
        sections: Sections = {}
        if first:
            sections["compute"] = {"micro_batch_tokens": training[first]}
        if changed := {k: v for k, v in generation[second].items() if v != getattr(rollout, k)}:
            sections["rollout"] = changed
        if sections:
            yield sections


def _halved(value: int, smallest: int) -> list[int]:
    """A setting's value, half of it, and so on."""
    values = [value]
    while values[-1] // 2 >= smallest:
        values.append(values[-1] // 2)
    return values


def _disk_advice(planner: Planner, stages: list[Estimate]) -> str:
    largest = max(stages, key=lambda stage: stage.disk)
    return f"most of it is for {largest.stage} ({largest.disk / 1e9:.0f} GB with DVC's copy)"
