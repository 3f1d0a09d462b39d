"""What DVC runs a stage again for, and what an unfinished stage begins again for."""

from typing import Any

import pytest
import yaml

from dgpo_core.config.params import Params, overlay, resolve_profile
from tests.conftest import ROOT

STAGES = ("teach", "distributions", "distill", "reinforce", "evaluate")
SECTIONS = ("rollout", "retrieval", "compute")
PARAMS = Params.model_validate(resolve_profile(ROOT / "profiles/tiny.yaml"))


def watched(stage: str) -> list[str]:
    stages: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    keys: list[str] = stages[stage].get("do", stages[stage])["params"]
    return keys


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_watches_what_decides_the_result(stage: str) -> None:
    """All of a section that is not free; where nothing is trained, no more of `compute` than is used."""
    keys = watched(stage)
    for section in SECTIONS:
        deciding = {f"{section}.{key}" for key in PARAMS.sections(section)[section]}
        found = {key for key in keys if key.split(".")[0] == section}
        if section == "compute" and stage in ("teach", "evaluate", "distributions"):
            assert "compute.device" in found and found < deciding
        else:
            assert found == (set() if stage == "distributions" else deciding)


def test_dvc_watches_what_decides_the_teachers_episodes() -> None:
    deciding = {f"teach.{key}" for key in PARAMS.sections("teach")["teach"]}
    assert {key for key in watched("teach") if key.startswith("teach")} == deciding
    assert "teach.endpoint" not in deciding and "teach.policy" in deciding


def test_dvc_watches_all_that_an_index_is_made_of() -> None:
    served = {"location", "qdrant"}
    wanted = {f"retrieval.{key}" for key in PARAMS.retrieval.model_dump() if key not in served}
    assert {key for key in watched("index") if key.startswith("retrieval")} == wanted


@pytest.mark.parametrize(
    ("change", "goes_on"),
    [
        ({"rollout": {"server": {"student": ["http://other:8101"]}, "batch_tokens": 1024}}, True),
        ({"rollout": {"vllm": {"gpu_memory_utilization": 0.5}}}, True),
        ({"retrieval": {"location": "http://other:6333", "qdrant": {"shards": 2}}}, True),
        ({"compute": {"micro_batch_tokens": 512, "processes": 2}}, True),
        ({"reinforce": {"checkpoint_every": 1}}, True),
        ({"teach": {"endpoint": {"timeout": 5.0, "key_variable": "OTHER"}}}, True),
        ({"teach": {"policy": "expert"}}, False),
        ({"rollout": {"precision": "bfloat16"}, "compute": {"precision": "bfloat16"}}, False),
        ({"retrieval": {"top_k": 5}}, False),
        ({"compute": {"lora": {"rank": 4}}}, False),
        ({"seed": 1}, False),
    ],
)
def test_unfinished_work_goes_on_unless_its_result_would_change(
    change: dict[str, Any], goes_on: bool
) -> None:
    names = ("rollout", "retrieval", "compute", "reinforce", "seed", "teach")
    changed = Params.model_validate(overlay(PARAMS.model_dump(), change))
    assert changed != PARAMS
    assert (changed.sections(*names) == PARAMS.sections(*names)) is goes_on
