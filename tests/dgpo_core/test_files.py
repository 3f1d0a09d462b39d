"""Files and folders that are whole or absent."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dgpo_core.files import parsed_json, remove, replacement, write_json, write_text


def make_file(path: Path, text: str) -> None:
    path.write_text(text)


def make_folder(path: Path, text: str) -> None:
    path.mkdir()
    (path / "inner").write_text(text)


MAKERS = [make_file, make_folder]


def content(path: Path) -> str:
    return (path / "inner" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("new", MAKERS)
@pytest.mark.parametrize("old", [*MAKERS, None])
def test_what_is_there_is_replaced_when_the_body_has_succeeded(
    old: Callable[[Path, str], None] | None, new: Callable[[Path, str], None], tmp_path: Path
) -> None:
    target = tmp_path / "below" / "target"
    target.parent.mkdir()
    if old:
        old(target, "old")
        old(target.with_name("target.part"), "of a killed process")
    with replacement(target) as part:
        new(part, "new")
        assert (content(target) if old else target.exists()) == ("old" if old else False)
    assert content(target) == "new"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("new", MAKERS)
def test_a_failed_body_leaves_what_was_there(new: Callable[[Path, str], None], tmp_path: Path) -> None:
    target = tmp_path / "target"
    make_file(target, "old")
    with pytest.raises(RuntimeError, match="failed"), replacement(target) as part:
        new(part, "half")
        raise RuntimeError("failed")
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    make_file(tmp_path / "elsewhere", "old")
    (tmp_path / "link").symlink_to("elsewhere")
    write_text(tmp_path / "link", "new")
    write_json(tmp_path / "data.json", {"b": 1, "a": [None]})
    assert (tmp_path / "elsewhere").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"
    assert (tmp_path / "data.json").read_text() == '{\n  "a": [\n    null\n  ],\n  "b": 1\n}\n'


def test_removing_takes_links_and_not_what_they_lead_to(tmp_path: Path) -> None:
    make_folder(tmp_path / "folder", "kept")
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    remove(tmp_path / "nothing")
    assert content(tmp_path / "folder") == "kept"
    remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"[" * 100_000, "\udc80", b"\xff", "{", '{"a":' * 100_000])
def test_what_is_no_json_or_too_deep_is_a_value_error(content: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"decode|Expecting|deeply"):
        parsed_json(content)
