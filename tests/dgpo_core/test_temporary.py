"""Temporary folders: removed at the end of their block or, of a killed process, by the next one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dgpo_core.temporary import remove_left_over, temporary_folder
from tests.conftest import ROOT

HOLD = """
import sys, time
from dgpo_core.temporary import temporary_folder
with temporary_folder("index") as folder:
    (folder / "vectors").write_text("much")
    print(folder, flush=True)
    time.sleep(600)
"""


def holding(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a temporary folder in `parent`, and that folder."""
    environment = {**os.environ, "TMPDIR": str(parent), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    (tmp_path / "dgpo-qdrant-of-others").mkdir()
    killed, left = holding(tmp_path)
    living, kept = holding(tmp_path)
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait(timeout=30)
        assert left.is_dir()
        with temporary_folder("index", tmp_path) as ours:
            assert not left.exists()
            assert (kept / "vectors").read_text() == "much"
            remove_left_over(tmp_path)
            assert ours.is_dir(), "its own process lives too"
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["dgpo-qdrant-of-others", kept.name, f"{kept.name}.owner"]
        )
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate(timeout=30)


def test_it_goes_whatever_happens_in_its_block(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), temporary_folder("index", tmp_path) as folder:
        (folder / "deeper").mkdir()
        raise ValueError("a bug")
    assert list(tmp_path.iterdir()) == []


def test_what_others_have_left_is_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dgpo-index-1234"
    folder.mkdir()
    (tmp_path / "dgpo-index-1234.owner").touch()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    remove_left_over(tmp_path)
    assert folder.is_dir()
    monkeypatch.undo()
    remove_left_over(tmp_path)
    assert list(tmp_path.iterdir()) == []
