"""What the dashboard's form lets through."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from dgpo_core.config.params import read_yaml, resolve_profile
from dgpo_core.config.yaml_text import as_text
from flows.settings import PipelineSettings, choices, with_choices, with_overrides
from tests.conftest import ROOT

NAMES = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
VALUES = st.one_of(st.integers(), st.booleans(), st.floats(-1e6, 1e6), st.lists(st.integers(), max_size=3))


def test_nothing_is_needed() -> None:
    assert PipelineSettings() == PipelineSettings.model_validate({})
    assert PipelineSettings().revision == "HEAD"


@pytest.mark.parametrize("text", ["beta", "=1", "a b=1", "reinforce..beta=1", ".beta=1", "--force=1", "a.=2"])
def test_overrides_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not key=value"):
        with_overrides({}, [text])


@pytest.mark.parametrize(
    "settings",
    [{"seeds": [-1]}, {"max_parallel": 0}, {"colour": 1}, {"overrides": "a=1"}, {"force": "maybe"}],
)
def test_other_mistakes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PipelineSettings.model_validate(settings)


@given(path=st.lists(NAMES, min_size=1, max_size=4), value=VALUES)
def test_an_override_changes_one_value_and_leaves_the_rest(path: list[str], value: Any) -> None:
    params: dict[str, Any] = {"untouched": {"a": 1}, "list": [1, 2]}
    changed = with_overrides(params, [f"{'.'.join(path)}={value}"])
    found: Any = changed
    for name in path:
        found = found[name]
    assert found == (pytest.approx(value) if isinstance(value, float) else value)
    assert params == {"untouched": {"a": 1}, "list": [1, 2]}
    if path[0] not in params:
        assert {key: changed[key] for key in params} == params


def test_values_may_hold_equals_signs() -> None:
    params = with_overrides({"a": {"b": 1}}, ["a.b=x=y", "a.c=null"])
    assert params == {"a": {"b": "x=y", "c": None}}


def test_the_usual_values_are_overrides_too() -> None:
    settings = PipelineSettings(beta=1e-5, learning_rate=2e-4, steps=8, overrides=["evaluate.questions=30"])
    params = with_overrides(read_yaml(ROOT / "params.yaml"), settings.changes)
    assert params["reinforce"]["beta"] == 1e-5 and params["reinforce"]["actor_learning_rate"] == 2e-4
    assert params["reinforce"]["steps"] == 8 and params["evaluate"]["questions"] == 30
    assert PipelineSettings().changes == []
    twice = PipelineSettings(questions=10, overrides=["evaluate.questions=30"])
    with pytest.raises(ValueError, match=r"overrides: evaluate\.questions has two values"):
        with_overrides({}, twice.changes)


@pytest.fixture(scope="module")
def form() -> dict[str, Any]:
    """What the dashboard gets of a flow with these settings."""
    settings = PipelineSettings.model_json_schema()
    reference = {"settings": {"$ref": "#/definitions/PipelineSettings", "default": {"profile": None}}}
    schema = {"type": "object", "properties": reference, "definitions": {"PipelineSettings": settings}}
    return with_choices(schema, choices(ROOT))


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, False),
        ({"profile": "tiny", "recipes": ["all"], "targets": ["distill@taid"], "from_stage": "teach"}, False),
        ({"beta": 0, "steps": 8, "learning_rate": 0.001, "questions": 10, "max_parallel": 2}, False),
        ({"profile": "huge"}, True),
        ({"recipes": ["dpo"]}, True),
        ({"targets": ["teach", "distil@kd"]}, True),
        ({"from_stage": ""}, True),
        ({"beta": "much"}, True),
        ({"steps": 0}, True),
    ],
)
def test_the_form_offers_what_there_is(form: dict[str, Any], settings: dict[str, Any], wrong: bool) -> None:
    assert form["properties"]["settings"]["default"] == {}
    assert Draft202012Validator(form).is_valid({"settings": settings}) is not wrong


@pytest.mark.parametrize(("profile", "recipes"), [("smol", None), ("tiny", ["all", "variants"])])
def test_every_stage_that_dvc_finds_can_be_chosen(
    profile: str, recipes: list[str] | None, empty_dvc_repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(empty_dvc_repository, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    params = resolve_profile(ROOT / f"profiles/{profile}.yaml", recipes)
    (tmp_path / "params.yaml").write_text(as_text(params))
    with Repo(str(tmp_path)) as repo:
        names = {stage.name for stage in repo.index.stages}
    assert len(names) > 10 and names <= set(choices(ROOT)["stages"])


def test_a_value_has_no_keys() -> None:
    with pytest.raises(ValueError, match=r"a\.b\.c: b is a value"):
        with_overrides({"a": {"b": 1}}, ["a.b.c=2"])


def test_numbers_are_those_of_params_yaml() -> None:
    assert with_overrides({}, ["a=1e-5", "b=yes"]) == {"a": 1e-5, "b": "yes"}


@pytest.mark.parametrize("value", ["[1", "{a: 1", '"x', "a: b: c", "\t-"])
def test_a_value_that_is_no_yaml_is_named(value: str) -> None:
    with pytest.raises(ValueError, match=r"overrides: a\.b=.*: not valid YAML"):
        with_overrides({}, [f"a.b={value}"])
