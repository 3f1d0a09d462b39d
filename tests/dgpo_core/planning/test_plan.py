"""Plans: what must grow with what, what does not fit, and that the advice makes it fit."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.training import ComputeConfig
from dgpo_core.errors import UserError
from dgpo_core.planning.estimate import Planner, StageCost
from dgpo_core.planning.plan import make_plan
from dgpo_core.planning.shapes import Architecture, Training, architecture_of, table
from dgpo_core.planning.workload import (
    GIB,
    PROCESSOR,
    Device,
    Machine,
    Workload,
    assumed,
    device_of,
    expected_counts,
)

PROFILES = Path(__file__).parents[3] / "profiles"
STUDENT, TEACHER = (
    Architecture.from_config(table()[name]["config"]) for name in ("Qwen2.5-0.5B", "Qwen2.5-3B")
)


def planner(device: Device | None = None, gpus: int = 8, **compute: Any) -> Planner:
    """Of one process that generates by itself, unless `compute` says otherwise."""
    profile = resolve_profile(PROFILES / "paper-qwen-3b.yaml")
    profile["compute"] = {"processes": 1} | compute
    profile["rollout"] = {"engine": "transformers"}
    params = Params.model_validate(profile)
    train, test, passages = expected_counts(params)
    lengths = assumed(params.protocol, params.retrieval.top_k)
    work = Workload(train, test, passages, 100, lengths, 0.35, 0.65, {})
    encoder = architecture_of(params.retrieval.encoder.model)
    machine = Machine(gpus, device or device_of("h200"))
    return Planner(params, STUDENT, TEACHER, encoder, work, machine)


def changed(made: Planner, section: str, **values: Any) -> Planner:
    """The same plan with other settings of a section."""
    config = getattr(made.params, section).model_copy(update=values)
    return replace(made, params=made.params.model_copy(update={section: config}))


def stage(made: Planner, name: str) -> StageCost:
    return next(s for s in made.stages() if s.stage == name)


@given(st.floats(1.1, 10))
def test_longer_episodes_cost_more(factor: float) -> None:
    short = planner()
    own = short.work.lengths
    lengths = replace(own, model=own.model * factor, environment=own.environment * factor)
    long = replace(short, work=replace(short.work, lengths=lengths))
    for before, after in zip(short.stages(), long.stages(), strict=True):
        assert after.tokens >= before.tokens and after.flops >= before.flops and after.disk >= before.disk
        assert after.seconds >= before.seconds


def test_more_gpus_share_training_and_zero_shares_the_states() -> None:
    one, eight = stage(planner(), "distill@kd"), stage(planner(processes=8), "distill@kd")
    assert one.seconds / 8 <= eight.seconds < 0.2 * one.seconds
    assert eight.memory == one.memory


# bytes a parameter in one of two processes, as counted in DeepSpeed's live tensors: weights and those for
# rollouts, gradients, masters with moments
MEASURED = {1: (2.0, 6.0, 6.0), 2: (2.0, 2.0, 6.0), 3: (3.0, 2.0, 6.0)}


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_splits_what_deepspeed_splits(zero: int) -> None:
    compute = ComputeConfig(engine="deepspeed", processes=2, zero_stage=zero)  # type: ignore[arg-type]
    parts = Training(STUDENT, compute).states()
    weights = parts["weights"] + parts.get("weights for rollouts", 0)
    found = (weights, parts["gradients"], parts["optimizer"])
    assert tuple(size / STUDENT.parameters for size in found) == MEASURED[zero]


def test_offload_moves_states_to_the_host_and_adapters_are_all_that_is_trained() -> None:
    common: dict[str, Any] = {"engine": "deepspeed", "processes": 8}
    here = stage(planner(**common), "distill@kd")
    there = stage(planner(**common, offload=True), "distill@kd")
    assert "optimizer" in here.memory and "optimizer" not in there.memory
    assert there.host - here.host == 20 * STUDENT.parameters
    adapted = stage(planner(lora={"rank": 32}), "distill@kd")
    assert adapted.memory["optimizer"] == 8 * STUDENT.adapters(32) < 0.05 * 8 * STUDENT.parameters
    assert adapted.disk < here.disk and adapted.flops < here.flops
    split, whole = (
        stage(planner(engine="deepspeed", processes=8, split_teacher=s), "distill@kd").memory
        for s in (True, False)
    )
    assert whole["teacher weights"] == 2 * TEACHER.parameters > split["teacher weights"]
    assert "teacher cast" not in whole


def test_checkpointing_takes_less_memory_and_more_time() -> None:
    before, after = (stage(planner(gradient_checkpointing=again), "distill@kd") for again in (False, True))
    assert after.device_memory < before.device_memory and 1 < after.flops / before.flops < 4 / 3


@pytest.mark.parametrize(("quantization", "memory", "disk"), [("int8", 18e9, 63e9), ("binary", 3.7e9, 49e9)])
def test_a_server_takes_what_was_measured(quantization: str, memory: float, disk: float) -> None:
    """docs/scaling.md's table, whose graph is 50 bytes a passage smaller than its bound."""
    made = planner()
    qdrant = made.params.retrieval.qdrant.model_copy(update={"quantization": quantization})
    server = changed(made, "retrieval", qdrant=qdrant).server()
    assert server is not None
    assert server["memory"] - 50 * 21_015_324 == pytest.approx(memory, rel=0.03)
    assert server["disk"] - 50 * 21_015_324 == pytest.approx(disk, rel=0.03)


def test_what_does_not_fit_fits_with_the_advice() -> None:
    small = planner(Device("small", 48 * GIB))
    made = make_plan(small)
    problem = next(p for p in made.problems if p.stage == "reinforce@dgpo")
    assert problem.what == "GPU memory" and problem.needed > problem.available
    key, value = problem.advice.split(": ")
    assert key == "compute.micro_batch_tokens"
    for tokens, fits in ((int(value), True), (2 * int(value), False)):
        again = stage(changed(small, "compute", micro_batch_tokens=tokens), "reinforce@dgpo")
        assert (again.device_memory <= 48 * GIB) == fits
    assert not make_plan(planner(Device("large", 200 * GIB))).problems
    hopeless = make_plan(planner(Device("tiny", 2 * GIB)))
    assert {p.advice for p in hopeless.problems} == {"no setting here makes it fit: GPUs with more memory"}


def with_advice(before: Planner, advice: str) -> Planner:
    """What params.yaml says after somebody has followed `advice`."""
    content = before.params.model_dump(mode="json")
    for line in advice.split(", "):
        name, value = line.split(": ", 1)
        section, key = name.split(".")
        content[section][key] = yaml.safe_load(value)
    return replace(before, params=Params.model_validate(content))


@pytest.mark.parametrize("gpus", [1, 8])
def test_every_advice_can_be_followed_and_helps(gpus: int) -> None:
    advised = set()
    for size in (64, 48, 32, 24, 20, 16, 14, 12, 10, 8, 7, 6, 5):
        small = planner(Device("small", size * GIB), gpus)
        for problem in make_plan(small).problems:
            if problem.advice.startswith("no setting"):
                continue
            advised |= set(re.findall(r"\.(\w+): ", problem.advice))
            mended = stage(with_advice(small, problem.advice), problem.stage)
            assert mended.device_memory <= size * GIB < problem.needed
    assert advised >= {"micro_batch_tokens", "gradient_checkpointing", "engine", "offload"}
    assert gpus == 1 or advised >= {"processes", "zero_stage", "split_teacher"}


def test_an_embedded_index_of_all_passages_wants_a_server() -> None:
    made = changed(planner(), "retrieval", location="embedded")
    machine = replace(made.machine, memory=64 * GIB, disk=100e9)
    problems = {p.stage: p for p in make_plan(replace(made, machine=machine)).problems}
    assert problems["index"].what == "host memory" and "Qdrant server" in problems["index"].advice
    assert problems["index"].needed > 21_015_324 * 768 * 4
    assert problems["all"].what == "disk" and "index" in problems["all"].advice


def test_a_plan_is_plain_json_also_without_a_gpu_and_without_speed() -> None:
    fast, unknown = make_plan(planner()), make_plan(planner(device_of("80")))
    processor = make_plan(planner(PROCESSOR, gpus=0))
    assert fast.hours > 0 and math.isnan(unknown.hours) and math.isnan(processor.hours)
    for made in (fast, unknown, processor):
        content = json.loads(json.dumps(made.to_json(), allow_nan=False))
        assert {s["stage"] for s in content["stages"]} >= {"index", "teach", "reinforce@dgpo", "evaluate@kd"}
    priced = make_plan(replace(planner(), machine=replace(planner().machine, price=2.0)))
    assert priced.cost == pytest.approx(2.0 * 8 * priced.hours)


def test_devices_are_named_or_sized() -> None:
    assert device_of("H100") == device_of("h100") and device_of("24").memory == 24 * GIB
    for wrong in ("gtx", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="neither GiB of memory nor one of h200, h100"):
            device_of(wrong)


def test_slots_are_the_episodes_at_a_time_and_no_history_is_read_again() -> None:
    made = planner()
    few, many, more = (stage(changed(made, "rollout", slots=n), "teach") for n in (8, 64, 10**6))
    assert few.tokens == many.tokens == pytest.approx(made.work.teach * made.work.lengths.total)
    assert few.memory["key-value cache"] * 8 == pytest.approx(many.memory["key-value cache"])
    assert few.seconds > many.seconds > more.seconds > 0
    assert more == stage(changed(made, "rollout", slots=made.params.teach.chunk), "teach")


def test_of_trainings_a_step_is_under_way_not_a_chunk_of_evaluation() -> None:
    made = planner()
    alone = changed(made, "evaluate", chunk=1)
    for name in ("teach", "distill@kd", "reinforce@dgpo", "evaluate@kd"):
        assert (stage(alone, name).seconds == stage(made, name).seconds) == (name != "evaluate@kd")


def test_fewer_slots_are_advised_where_passes_cannot_be_smaller() -> None:
    made = planner(Device("small", 29.6 * GIB))
    smallest = made.params.protocol.max_context
    narrow = changed(made, "rollout", batch_tokens=smallest, slots=512)
    problems = {problem.stage: problem for problem in make_plan(narrow).problems}
    advice = problems["teach"].advice
    assert "slots" in advice and "batch_tokens" not in advice
    assert stage(with_advice(narrow, advice), "teach").device_memory <= 29.6 * GIB < problems["teach"].needed


def test_overlap_hides_rollouts_on_gpus_of_their_own() -> None:
    profile = resolve_profile(PROFILES / "paper-qwen-3b.yaml")
    profile["rollout"] = {"engine": "vllm-server", "server": {"student": ["http://a", "http://b"]}}
    made = planner(processes=4)
    rollout = Params.model_validate(profile).rollout
    apart = replace(made, params=made.params.model_copy(update={"rollout": rollout}))
    for of, hides in ((made, False), (apart, True)):
        before, after = (
            stage(changed(of, "reinforce", overlap=overlap), "reinforce@dgpo") for overlap in (False, True)
        )
        assert (after.seconds < before.seconds) == hides and before.seconds <= 2 * after.seconds
        assert after.flops == before.flops
        assert after.memory["weights of a step ago"] == 4 * STUDENT.parameters
