"""Plans: what must grow with what, what does not fit, and that the advice makes it fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.errors import UserError
from dgpo_core.planning import passes
from dgpo_core.planning.architectures import Architecture, architecture_of, table
from dgpo_core.planning.episodes import assumed
from dgpo_core.planning.machine import GIB, PROCESSOR, Device, Machine, device_of
from dgpo_core.planning.plan import make_plan
from dgpo_core.planning.stages import Estimate, Planner, Setup
from dgpo_core.planning.workload import Workload, expected_counts

PROFILES = Path(__file__).parents[3] / "profiles"
STUDENT, TEACHER = (
    Architecture.from_config(table()[name]["config"]) for name in ("Qwen2.5-0.5B", "Qwen2.5-3B")
)
PRECISIONS = st.sampled_from(["float32", "bfloat16"])


def planner(device: Device | None = None, gpus: int = 8, setup: Setup | None = None) -> Planner:
    params = Params.model_validate(resolve_profile(PROFILES / "paper-qwen-3b.yaml"))
    train, test, passages = expected_counts(params)
    lengths = assumed(params.protocol, params.retrieval.top_k)
    work = Workload(train, test, passages, 100, lengths, 0.35, 0.65, {})
    encoder = architecture_of(params.retrieval.encoder.model)
    machine = Machine(gpus, device or device_of("h200"))
    return Planner(params, STUDENT, TEACHER, encoder, work, machine, setup or Setup())


def stage(made: Planner, name: str) -> Estimate:
    return next(s for s in made.stages() if s.stage == name)


@given(st.floats(1, 1e6), st.floats(1, 1e6), PRECISIONS)
def test_memory_and_flops_grow_with_tokens(first: float, second: float, precision: str) -> None:
    less, more = sorted((first, second))
    for function in (passes.activation_bytes, passes.passing_bytes):
        assert function(STUDENT, less, precision) <= function(STUDENT, more, precision)
    width = passes.CACHE_WIDTH[precision]
    assert passes.cache_bytes(STUDENT, less, width) <= passes.cache_bytes(STUDENT, more, width)
    assert passes.training_flops(STUDENT, less, less**2) <= passes.training_flops(STUDENT, more, more**2)


@given(
    st.sampled_from(["hidden", "layers", "queries", "keys", "intermediate", "vocabulary"]),
    st.integers(1, 4096),
)
def test_everything_grows_with_every_size(size: str, extra: int) -> None:
    larger = replace(STUDENT, **{size: getattr(STUDENT, size) + extra})
    assert larger.parameters > STUDENT.parameters
    for precision in ("float32", "bfloat16"):
        for of in (passes.activation_bytes, passes.passing_bytes):
            assert of(larger, 100, precision) >= of(STUDENT, 100, precision)
    assert passes.forward_flops(larger, 10, 100) >= passes.forward_flops(STUDENT, 10, 100)


def test_training_is_three_forward_passes_but_for_attention() -> None:
    assert passes.training_flops(STUDENT, 1000, 0) == 3 * passes.forward_flops(STUDENT, 1000, 0)
    assert passes.forward_flops(STUDENT, 1, 0) == 2 * STUDENT.matrices


@given(st.floats(1.1, 10))
def test_longer_episodes_cost_more(factor: float) -> None:
    short = planner()
    own = short.work.lengths
    lengths = replace(own, model=own.model * factor, environment=own.environment * factor)
    long = replace(short, work=replace(short.work, lengths=lengths))
    for before, after in zip(short.stages(), long.stages(), strict=True):
        assert after.tokens >= before.tokens and after.flops >= before.flops and after.disk >= before.disk
        assert (after.seconds or 0) >= (before.seconds or 0)


def test_more_gpus_share_training_and_zero_shares_the_states() -> None:
    one, eight = stage(planner(), "distill@kd"), stage(planner(setup=Setup(8)), "distill@kd")
    assert (one.seconds or 0) / 8 <= (eight.seconds or 0) < 0.2 * (one.seconds or 0)
    assert eight.memory == one.memory
    sizes = [stage(planner(setup=Setup(8, zero)), "distill@kd").device_memory for zero in (0, 1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[3]
    # 16 bytes a parameter, whoever has them
    states = [stage(planner(setup=s), "reinforce@dgpo").memory for s in (Setup(1), Setup(1, 3))]
    totals = [sum(parts[k] for k in ("weights", "gradients", "optimizer")) for parts in states]
    assert totals[0] == totals[1] == 16 * STUDENT.parameters


def test_what_does_not_fit_fits_with_the_advice() -> None:
    small = planner(Device("small", 48 * GIB))
    made = make_plan(small)
    problem = next(p for p in made.problems if p.stage == "reinforce@dgpo")
    assert problem.what == "GPU memory" and problem.needed > problem.available
    key, value = problem.advice.split(": ")
    assert key == "compute.micro_batch_tokens"
    compute = small.params.compute.model_copy(update={"micro_batch_tokens": int(value)})
    mended = replace(small, params=small.params.model_copy(update={"compute": compute}))
    assert stage(mended, "reinforce@dgpo").device_memory <= 48 * GIB
    twice = compute.model_copy(update={"micro_batch_tokens": 2 * int(value)})
    unmended = replace(small, params=small.params.model_copy(update={"compute": twice}))
    assert stage(unmended, "reinforce@dgpo").device_memory > 48 * GIB
    assert not make_plan(planner(Device("large", 200 * GIB))).problems
    hopeless = make_plan(planner(Device("tiny", 2 * GIB)))
    assert {p.advice for p in hopeless.problems} == {"no setting here makes it fit: GPUs with more memory"}


def test_an_embedded_index_of_all_passages_wants_a_server() -> None:
    made = planner()
    retrieval = made.params.retrieval.model_copy(update={"location": "embedded"})
    params = made.params.model_copy(update={"retrieval": retrieval})
    machine = replace(made.machine, memory=64 * GIB, disk=100e9)
    problems = {p.stage: p for p in make_plan(replace(made, params=params, machine=machine)).problems}
    assert problems["index"].what == "host memory" and "Qdrant server" in problems["index"].advice
    assert problems["index"].needed > 21_015_324 * 768 * 4
    assert problems["all"].what == "disk" and "index" in problems["all"].advice


def test_a_plan_is_plain_json_also_without_a_gpu_and_without_speed() -> None:
    fast, unknown = make_plan(planner()), make_plan(planner(device_of("80")))
    processor = make_plan(planner(PROCESSOR, gpus=0))
    assert fast.hours and fast.hours > 0 and unknown.hours is None is processor.hours
    for made in (fast, unknown, processor):
        content = json.loads(json.dumps(made.to_json(), allow_nan=False))
        assert {s["stage"] for s in content["stages"]} >= {"index", "teach", "reinforce@dgpo", "evaluate@kd"}
    priced = make_plan(replace(planner(), machine=replace(planner().machine, price=2.0)))
    assert priced.cost == pytest.approx(2.0 * 8 * (priced.hours or 0))


def test_devices_are_named_or_sized() -> None:
    assert device_of("H100") == device_of("h100") and device_of("24").memory == 24 * GIB
    for wrong in ("gtx", "0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="neither GiB of memory nor one of h200, h100"):
            device_of(wrong)
