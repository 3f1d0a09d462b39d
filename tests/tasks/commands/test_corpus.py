"""`dgpo corpus` as it is typed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dgpo_core.datasets.records import read_corpus
from tasks.commands.cli import app


def test_counts_and_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/moons.md").write_text("# Moons\n\nPhobos and Deimos orbit Mars.\n")
    Path("notes/photo.jpg").write_bytes(b"")
    ran = CliRunner().invoke(app, ["corpus", "notes", "--out", "corpus.jsonl"])
    assert ran.exit_code == 0, ran.output
    lines = [line.split() for line in ran.output.splitlines()]
    assert ["Markdown", "1"] in lines
    assert "1 passages of 5 words on average" in ran.output
    assert "not read: notes/photo.jpg: a kind that is not read" in ran.output
    (passage,) = read_corpus(Path("corpus.jsonl"))
    assert (passage.title, passage.text) == ("Moons", "Phobos and Deimos orbit Mars.")
