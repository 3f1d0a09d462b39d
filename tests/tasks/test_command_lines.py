"""The eleven stage programs on the command line: what `--help` says, and that a mistake runs nothing."""

import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ALONE = ["data", "index", "audit", "teach", "filter", "distributions", "report"]
WITH_ARGUMENT = {"base_model": "model", "distill": "recipe", "reinforce": "recipe", "evaluate": "model"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "dvc.yaml").symlink_to(ROOT / "dvc.yaml")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["dvc.yaml"], "it has run"


def run(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> object:
    """The exit code of `python -m tasks.stages.<program> <arguments>`."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"tasks.stages.{program}", run_name="__main__", alter_sys=True)
    return ended.value.code


@pytest.mark.parametrize("program", [*ALONE, *WITH_ARGUMENT])
def test_help_says_what_a_stage_reads_and_writes(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, program, "--help") == 0
    said = capsys.readouterr().out
    name = program.replace("_", "-")
    assert f"usage: python -m tasks.stages.{program} [-h]" in said and f"Stage `{name}`: " in said
    assert "\nwrites: " in said and f"`dvc repro {name}" in said
    assert "dgpo_core" not in said and "${" not in said


def test_help_names_the_files_of_dvcs_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "distill", "--help")
    said = capsys.readouterr().out
    assert "models/given/teacher, models/<its start>, data/teacher/episodes.parquet" in " ".join(said.split())
    written = "models/<recipe>, plots/processor_time/distill-<recipe>.csv, metrics/distill-<recipe>.json"
    assert f"writes: {written}, plots/distill-<recipe>.csv" in " ".join(said.split())
    assert "`dvc repro distill@<recipe>`" in said


def test_a_graph_of_other_stages_has_nothing_to_say(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dvc.yaml").unlink()
    (folder / "dvc.yaml").write_text("stages:\n  own: {cmd: exec python own.py}\n")
    assert run(monkeypatch, "filter", "--help") == 0
    assert "writes" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["kd", "more"], ["--force", "kd"]])
def test_a_stage_with_an_argument_wants_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for program, argument in WITH_ARGUMENT.items():
        assert run(monkeypatch, program, *arguments) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        wanted = f"required: {argument}" if not arguments else "unrecognized arguments"
        assert last.startswith(f"python -m tasks.stages.{program}: error: ") and wanted in last


@pytest.mark.parametrize("program", ALONE)
def test_a_stage_without_an_argument_wants_none(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, program, "kd") == 2
    assert "error: unrecognized arguments: kd" in capsys.readouterr().err
