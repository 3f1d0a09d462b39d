"""What comes from outside: arbitrary bytes and JSON, and valid ones that were changed somewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from dgpo_core.errors import UserError


def cases(share: float = 1.0) -> settings:
    """As many examples as the profile says, of slow tests a share; in the fast suite a fifth of them."""
    usual = settings()
    few = 1.0 if usual.max_examples > 1000 else 0.2
    return settings(max_examples=max(1, int(few * share * usual.max_examples)))


# Text that ends something, begins something, or that some library cannot take.
HOSTILE = [
    "", " ", "\x00", "\ud800", "\udfff\ud800", "\ufeff", "\u202e", "\u200b", "\u0301", "\r\n", "\x85\u2028",
    "</information>", "<answer>x</answer>", "<|im_end|>", "<|eot_id|>", "</s>", "{{ x }}", "{x}", "%s",
    "../../etc/passwd", "/", "nan", "1e999", "1" * 400, "٣", "true", "null", "[", "]", '"', "'", "[1, 2",
    "['a' 'b']", "hf://", "http://[", "openai:a@b", "embedded:", "=1+1", "x" * 5000,
]  # fmt: skip
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=20) | st.text(st.characters(), max_size=5)
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**400, 1e-320, -0.0])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def as_json(value: Any) -> bytes:
    """JSON as Python and JavaScript write it: half surrogate pairs escaped; nan and Infinity, too."""
    return json.dumps(value).encode()


@st.composite
def changed(draw: DrawFn, valid: Any) -> Any:
    """A JSON value with one to three places changed: another value, a key that is gone, new or another."""
    for _ in range(draw(st.integers(1, 3))):
        valid = draw(_changed_once(valid))
    return valid


@st.composite
def _changed_once(draw: DrawFn, value: Any) -> Any:
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(
        value, list
    ) else []  # fmt: skip
    what = (
        draw(st.sampled_from(["descend"] * 6 + ["replace", "remove", "rename", "add"])) if keys else "replace"
    )
    if what == "replace":
        return draw(JSON)
    copy, key = value.copy(), draw(st.sampled_from(keys))
    if what == "descend":
        copy[key] = draw(_changed_once(copy[key]))
    elif what == "remove":
        del copy[key]
    elif isinstance(copy, list):
        copy.insert(key, draw(JSON))
    else:
        copy[draw(TEXTS)] = copy.pop(key) if what == "rename" else draw(JSON)
    return copy


@st.composite
def changed_bytes(draw: DrawFn, valid: bytes) -> bytes:
    """Bytes with one to three pieces cut out, put in, doubled or replaced; or only their beginning."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 20)))
        piece = draw(
            st.binary(max_size=6)
            | st.sampled_from(HOSTILE).map(lambda text: text.encode("utf-8", "surrogatepass"))
            | st.just(bytes(content[start:stop]) * 2)
        )
        content[start:stop] = piece
    if draw(st.integers(0, 9)) == 0:
        del content[draw(st.integers(0, len(content))) :]
    return bytes(content)


def damaged(*valid: bytes) -> SearchStrategy[bytes]:
    """One of the valid files, changed; or no such file at all."""
    return st.one_of(*(changed_bytes(content) for content in valid), st.binary(max_size=60))


def json_lines(*valid: Any) -> SearchStrategy[bytes]:
    """Lines of records, of which one is changed; or changed bytes of them."""

    def with_changed(place: int) -> SearchStrategy[bytes]:
        return changed(valid[place]).map(
            lambda row: b"\n".join(as_json(row if i == place else own) for i, own in enumerate(valid))
        )

    rows = st.integers(0, len(valid) - 1).flatmap(with_changed)
    return rows | damaged(b"\n".join(map(as_json, valid)))


def read_or_refused(read: Callable[[], Any], *named: str | Path) -> Any:
    """What was read, or None where it was refused in a line that names one of `named`; all else is a bug."""
    try:
        return read()
    except UserError as error:
        message = str(error)
        message.encode("utf-8", "backslashreplace")
        assert any(str(name) in message for name in named), message
        return None
