"""Tests of hypothesis that libFuzzer drives."""

from pathlib import Path

import pytest

from tests.fuzz.guided import fuzzed

pytest.importorskip("atheris")
pytestmark = pytest.mark.thorough
TESTS = """
import pytest
from hypothesis import given
from hypothesis import strategies as st
from dgpo_core.files import parsed_json

@pytest.fixture(scope="module")
def allowed():
    return "[]{}"

@given(text=st.text("[]{}"))
def test_right(allowed, text):
    assert set(text) <= set(allowed)
    try:
        parsed_json(text)
    except ValueError:
        pass

@pytest.mark.parametrize("most", [1])
@given(text=st.text("[]{}"))
def test_wrong(allowed, most, text):
    try:
        parsed_json(text)
    except ValueError:
        return
    assert len(text) <= most, "an empty list or object is JSON"

def test_without_hypothesis():
    pass
"""


@pytest.fixture
def tests(tmp_path: Path) -> Path:
    path = tmp_path / "test_json.py"
    path.write_text(TESTS)
    return path


def test_a_test_that_holds_is_given_many_inputs(tests: Path) -> None:
    inputs, branches, failure = fuzzed(f"{tests}::test_right", seconds=2)
    assert inputs > 50 and branches > 0 and not failure


def test_what_breaks_a_test_is_found_and_told(tests: Path) -> None:
    _, _, failure = fuzzed(f"{tests}::test_wrong", seconds=60)
    assert "AssertionError: an empty list or object is JSON" in failure


def test_other_tests_run_as_they_do(tests: Path) -> None:
    assert fuzzed(f"{tests}::test_without_hypothesis", seconds=1) == (0, 0, "")
