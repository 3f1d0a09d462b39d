"""`dgpo plan`, and what it takes from earlier runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo_core.agent.episode import write_episodes
from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.datasets.published import PASSAGES
from dgpo_core.planning.estimate import StageCost
from dgpo_core.planning.plan import Plan
from dgpo_core.planning.workload import Machine, device_of
from tasks.commands.plan import ENCODER, plan_for, workload
from tasks.project import paths
from tests.dgpo_core.making import random_episode
from tests.tasks.commands.test_cli import dgpo
from tests.tasks.miniature import ROOT

PAIRS = ("paper-qwen-3b", "paper-qwen-7b", "paper-llama-8b")


@pytest.fixture(autouse=True)
def profiles(workplace: Path) -> None:
    (workplace / "profiles").symlink_to(ROOT / "profiles")


@pytest.mark.parametrize("name", PAIRS)
def test_the_papers_profiles_on_eight_gpus(name: str, workplace: Path) -> None:
    arguments = ("plan", "--profile", name, "--gpus", "8", "--gpu", "h200", "--price", "3")
    done = dgpo(workplace, *arguments, "--json")
    plan = json.loads(done.stdout)
    assert done.returncode == 0 and plan["problems"] == [], done.stderr
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    assert stages["index"]["tokens"] > 2e9 and stages["index"]["gpus"] == 8
    assert stages["teach"]["gpus"] == 4 and stages["reinforce@dgpo"]["gpus"] == 8  # with four servers
    assert 1e18 < stages["reinforce@dgpo"]["flops"] < 1e20
    assert plan["cost"] == pytest.approx(plan["hours"] * 24)
    assert "2 searches" in plan["assumptions"]["episodes"]
    assert 16e9 < plan["server"]["memory"] < 20e9  # wiki-18's vectors in int8, the graph, the ids
    text = dgpo(workplace, *arguments).stdout
    assert "Qdrant server, beside the stages: " in text
    assert "reinforce@dgpo" in text and "cost" in text
    crowded = dgpo(workplace, *arguments, "--processes", "8")
    assert crowded.returncode == 1 and "training needs 12 of GPUs, there are 8" in crowded.stdout


def papers(**retrieval: object) -> dict[str, Any]:
    """The paper's experiment, with other settings of `retrieval`."""
    resolved = resolve_profile(ROOT / "profiles/paper-qwen-3b.yaml")
    resolved["retrieval"] |= retrieval
    return resolved


def planned(**retrieval: object) -> Plan:
    return plan_for(Params.model_validate(papers(**retrieval)), Machine(8, device_of("h200")))


def index_of(plan: Plan) -> StageCost:
    return next(stage for stage in plan.stages if stage.stage == "index")


def sentence_transformers(model: object) -> dict[str, str]:
    return {"kind": "sentence-transformers", "model": str(model)}


def test_any_encoder_of_known_shape_is_planned_as_one(workplace: Path, minilm: Path) -> None:
    e5, small = planned(), planned(encoder=sentence_transformers(minilm))
    assert index_of(small).gpus == 8 and 0 < index_of(small).flops < index_of(e5).flops
    assert e5.server and small.server and 2e9 < small.server["memory"] < e5.server["memory"]
    assert ENCODER not in small.assumptions
    lexical = planned(encoder={"kind": "bm25"})
    assert index_of(lexical).gpus == index_of(lexical).flops == 0


def test_an_encoder_of_unknown_shape_is_planned_as_the_usual_one_and_said(workplace: Path) -> None:
    unknown = planned(encoder=sentence_transformers("somebody/an-encoder"))
    assert "somebody/an-encoder: neither a model folder" in unknown.assumptions[ENCODER]
    assert unknown.assumptions[ENCODER].endswith("planned as if it were intfloat/e5-base-v2")
    assert (index_of(unknown), unknown.server) == (index_of(planned()), planned().server)
    resolved = papers(encoder=sentence_transformers("somebody/an-encoder"))
    (workplace / "params.yaml").write_text(yaml.safe_dump(resolved))
    assert f"{ENCODER}: somebody/an-encoder: " in dgpo(workplace, "plan", "--gpus", "8").stdout


def test_a_published_index_is_downloaded_and_not_encoded(workplace: Path) -> None:
    encoded, there = index_of(planned()), index_of(planned(vectors=["part_aa", "part_ab"]))
    assert encoded.flops > 0 and (there.tokens, there.flops, there.seconds, there.gpus) == (0, 0, 0, 0)
    assert there.disk == encoded.disk
    parts = [f"hf://datasets/PeterJinGo/wiki-18-e5-index/part_{name}" for name in ("aa", "ab")]
    assert index_of(planned(vectors=parts)).disk - encoded.disk == 4 * 768 * PASSAGES


def test_a_retriever_service_leaves_nothing_to_make(workplace: Path) -> None:
    served = planned(location="retriever+http://retriever:8000")
    assert index_of(served) == StageCost("index") and served.server is None
    unknown = sentence_transformers("somebody/an-encoder")
    assert planned(location="retriever+http://retriever:8000", encoder=unknown) == served


def test_a_small_gpu_does_not_fit(workplace: Path) -> None:
    done = dgpo(workplace, "plan", "--profile", "paper-qwen-3b", "--gpus", "1", "--gpu", "40")
    assert done.returncode == 1 and "does not fit" in done.stdout
    assert "what helps: compute.micro_batch_tokens: " in done.stdout
    assert "hours, one stage after another: unknown" in done.stdout
    assert "neither GiB of memory nor" in dgpo(workplace, "plan", "--gpu", "none").stderr


def test_a_profile_of_the_processor_is_planned_without_gpus(workplace: Path) -> None:
    (workplace / "models").symlink_to(ROOT / "models")
    assert dgpo(workplace, "plan", "--profile", "tiny").stdout.startswith("profile tiny on no GPU")
    assert dgpo(workplace, "plan", "--profile", "tiny", "--gpu", "l4").stdout.startswith(
        "profile tiny on 8 x l4"
    )


@pytest.fixture
def ran(workplace: Path) -> Params:
    """A working tree in which the profile tiny has run, as far as the plan looks at it."""
    params = Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml"))
    write_episodes(paths.TEACHER_EPISODES, [random_episode(seed) for seed in range(9)])
    paths.METRICS.mkdir()
    (paths.METRICS / "filter.json").write_text('{"raw": 1000, "kept": 709}')
    (paths.METRICS / "reinforce-dgpo.json").write_text('{"em": 0.5}')
    paths.questions_file("onehop", "train").parent.mkdir(parents=True)
    paths.questions_file("onehop", "train").write_text("{}\n" * 300)
    paths.INDEX.mkdir(parents=True)
    (paths.INDEX / "manifest.json").write_text('{"passages": 2021, "average_words": 43.5}')
    recorded = {"cmd": "-", "params": {"params.yaml": params.model_dump(mode="json")}}
    stages = dict.fromkeys(("data", "teach", "reinforce@dgpo"), recorded)
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    return params


def test_what_is_assumed_before_anything_has_run(workplace: Path) -> None:
    before = workload(Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml")))
    assert before.train == {"onehop": 700, "twohop": 700} and before.passages == 4000
    assert before.correct == pytest.approx((0.365 + 0.340) / 2)  # the paper's teacher on NQ and HotpotQA


def test_what_was_measured_takes_the_place_of_what_is_assumed(ran: Params) -> None:
    after = workload(ran)
    assert after.train == {"onehop": 300, "twohop": 700}
    assert (after.passages, after.words, after.correct, after.gated) == (2021, 43.5, 0.709, 0.5)
    assert "measured: 9 episodes" in after.lengths.source


@pytest.mark.parametrize("name", PAIRS)
def test_what_another_profile_has_measured_here_does_not_count(
    name: str, ran: Params, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    params = Params.model_validate(resolve_profile(ROOT / f"profiles/{name}.yaml"))
    here = workload(params)
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert here == workload(params)


def test_what_was_measured_counts_for_the_stages_that_had_these_settings(ran: Params) -> None:
    """Other prompts and limits: the questions stay as they are, the episodes do not."""
    protocol = ran.protocol.model_copy(update={"max_turns": 2})
    other = workload(ran.model_copy(update={"protocol": protocol}))
    assert other.passages == 2021
    assert "assumed" in other.lengths.source and other.correct != 0.709 and other.gated != 0.5


def test_a_teacher_that_writes_text_computes_nothing_here() -> None:
    """Behind an endpoint, of which no shape is known; or the scripted expert."""
    params = resolve_profile(ROOT / "profiles/paper-qwen-3b.yaml", ["seqkd"])
    machine = Machine(8, device_of("h200"))
    here = plan_for(Params.model_validate(params), machine)
    endpoint = params | {
        "models": params["models"] | {"teacher": "openai:m@http://h/v1"},
        "compare": ["seqkd"],
    }
    for other in (endpoint, params | {"teach": params["teach"] | {"policy": "expert"}}):
        plan = plan_for(Params.model_validate(other), machine)
        (teach,) = (stage for stage in plan.stages if stage.stage == "teach")
        assert teach.tokens == teach.gpus == 0 and teach.disk > 0 and plan.hours < here.hours
