"""`dgpo experiments` with real DVC experiments, and its table in a narrow and in a wide terminal."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dgpo_core.config.params import resolve_profile
from tasks.commands.experiments import Row, changes, show, table
from tests.conftest import ROOT
from tests.tasks.miniature import git

MODELS = ["student", "teacher", "kd", "taid", "dgpo"]
STAGE = """
import json, pathlib, ruamel.yaml
beta = ruamel.yaml.YAML(typ="safe").load(pathlib.Path("params.yaml"))["reinforce"]["beta"]
pathlib.Path("metrics/evaluate-dgpo.json").write_text(json.dumps({"average": beta + 0.25}))
"""


def printed(rows: list[Row], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(rows, MODELS, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_fits_into_any_terminal_and_keeps_what_was_changed() -> None:
    head = {"reinforce.beta": "0.001", "seed": "0", "distill.learning_rate": "0.001"}
    em = dict(zip(MODELS, (0.0, 0.67, 0.247, 0.26, 0.304), strict=True))
    rows = [
        Row("working tree", head | {"seed": "1"}, em),
        Row("main", head),
        Row("  sunny-otter", head | {"reinforce.beta": "0.01", "distill.learning_rate": "0.0003"}, em),
    ]
    for width, models in ((60, 1), (80, 3), (160, 5)):
        lines = printed(rows, width)
        assert max(map(len, lines)) <= width
        titles = next(line for line in lines if "experiment" in line)
        assert [model for model in reversed(MODELS) if model in titles] == MODELS[::-1][:models]
        assert "sunny-otter" in "".join(lines) and "reinforce.beta=0.01" in "".join(lines)
    (main,) = (line for line in printed(rows, 160) if "main" in line)
    assert main.count(" - ") == 5 and "=" not in main


def test_what_a_row_changes_against_head() -> None:
    assert changes({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b=3", "c=4"]
    assert changes({"a": "1"}, {"b": "1"}) == ["a=(none)", "b=1"]
    assert changes({"a": "1"}, {}) == [], "it could not be read"


@pytest.mark.thorough
def test_experiments_of_dvc(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dvc(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True, capture_output=True, timeout=120)

    Path("params.yaml").write_text(yaml.safe_dump(resolve_profile(ROOT / "profiles/tiny.yaml")))
    Path("metrics").mkdir()
    Path("metrics/.gitignore").write_text("/evaluate-dgpo.json\n")
    Path("stage.py").write_text(STAGE)
    one = {"cmd": "python stage.py", "params": ["reinforce.beta"], "metrics": ["metrics/evaluate-dgpo.json"]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"one": one}}))
    git("init", "-q")
    git("config", "user.email", "a@example.org")
    git("config", "user.name", "a")
    dvc("init", "-q")
    dvc("repro")
    git("add", ".")
    git("commit", "-qm", "Results")
    dvc("exp", "run", "-n", "sunny-otter", "-S", "reinforce.beta=0.5")
    git("checkout", "-q", "params.yaml")
    monkeypatch.setenv("COLUMNS", "80")
    show(commits=False)
    lines = capsys.readouterr().out.splitlines()
    (tried,) = (line.split() for line in lines if "sunny-otter" in line)
    assert "reinforce.beta=0.5" in tried and "0.750" in tried
    assert not any("no results here" in line for line in lines)
    assert max(map(len, lines[:8])) <= 80
    git("clone", "-q", ".", "elsewhere")
    monkeypatch.chdir("elsewhere")  # whose cache has nothing
    show(commits=False)
    assert "has no results here" in capsys.readouterr().out
