"""Reading as DVC reads, and writing what every reader takes for the same."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from dgpo_core.config.yaml_text import as_text, parse

# pieces of what one of the two versions takes for something other than a text
WORDS = ["yes", "no", "on", "Off", "null", "0o", ".inf", "1:30", "2001-01-01"]
PIECES = st.sampled_from([*"0123456789eE+-._:oxbn~<=#&*!|>'\"%@`,[]{}? ", *WORDS])
TEXTS = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=6)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
@example({"\x85": None, "a": "b\u2028c"})  # line breaks of one version
@example({"+_": "-_1"})  # to ruamel, numbers
def test_what_is_written_means_the_same_to_every_reader(content: dict[str, Any]) -> None:
    text = as_text(content)
    assert parse(text) == content
    assert yaml.safe_load(text) == content  # version 1.1
    assert YAML(typ="safe", pure=True).load(text) == content  # DVC's
    assert list(parse(text)) == list(content)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-06", 1e-6),
        ("5E3", 5000.0),
        ("1.0e-06", 1e-6),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", 10),
        ("08", 8),
        ("0o17", 15),
        ("9223372036854775808", 2**63),
    ],
)
def test_values_are_read_as_version_1_2_has_them(text: str, value: object) -> None:
    found = parse(f"key: {text}")["key"]
    assert (type(found), found) == (type(value), value)
    assert list(parse(f"{text}: 1")) == [value]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [", "not valid YAML: line "),
        ("a: 1\na: 2\n", 'not valid YAML: line 2: found duplicate key "a"'),
        ("a: =\n", "not valid YAML: line 1: could not determine a constructor"),
        ("a: \x07", "not valid YAML: "),
    ],
)
def test_what_is_no_yaml_is_said_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="not valid YAML") as caught:
        parse(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert "http" not in str(caught.value)
