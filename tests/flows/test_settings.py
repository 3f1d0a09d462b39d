"""What the dashboard's form lets through."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.settings import PipelineSettings, with_overrides

NAMES = st.from_regex(r"[a-z][a-z_]{0,6}", fullmatch=True)
VALUES = st.one_of(st.integers(), st.booleans(), st.floats(-1e6, 1e6), st.lists(st.integers(), max_size=3))


def test_nothing_is_needed() -> None:
    assert PipelineSettings() == PipelineSettings.model_validate({})
    assert PipelineSettings().revision == "HEAD"


@pytest.mark.parametrize("text", ["beta", "=1", "a b=1", "reinforce..beta=1", ".beta=1", "--force=1", "a.=2"])
def test_overrides_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="is not key=value"):
        PipelineSettings(overrides=[text])


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


def test_later_overrides_win_and_values_may_hold_equals_signs() -> None:
    params = with_overrides({"a": {"b": 1}}, ["a.b=2", "a.b=x=y", "a.c=null"])
    assert params == {"a": {"b": "x=y", "c": None}}


def test_a_value_has_no_keys() -> None:
    with pytest.raises(ValueError, match=r"a\.b\.c: b is a value"):
        with_overrides({"a": {"b": 1}}, ["a.b.c=2"])


def test_numbers_are_those_of_params_yaml() -> None:
    assert with_overrides({}, ["a=1e-5", "b=yes"]) == {"a": 1e-5, "b": "yes"}


@pytest.mark.parametrize("value", ["[1", "{a: 1", '"x', "a: b: c", "\t-"])
def test_a_value_that_is_no_yaml_is_named(value: str) -> None:
    with pytest.raises(ValueError, match=r"overrides: a\.b=.*: not valid YAML"):
        with_overrides({}, [f"a.b={value}"])
