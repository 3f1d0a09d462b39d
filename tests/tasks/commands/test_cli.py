"""The command `dgpo`, run as its users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tasks.commands import cli
from tests.conftest import ROOT


def dgpo(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.commands.cli", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "COLUMNS": "100"}
    env |= variables
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["cli", "doctor", "ask", "serve", "mcp"])
def test_help_and_first_words_are_instant_because_nothing_heavy_is_imported(module: str) -> None:
    heavy = ("torch", "transformers", "mlflow", "prefect", "dvc")
    code = f"import sys, tasks.commands.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "program"),
    [
        ("run --target a b --force", "flows.server -- PYTHON -m flows.pipeline --target a b --force"),
        ("reproduce --prefect-port 7", "flows.server --port 7 -- PYTHON -m flows.reproduce --prefect-port 7"),
        ("deploy --gpus 2 --nightly", "flows.deploy --gpus 2 --nightly"),
        ("worker gpu --push", "flows.worker gpu --push"),
        ("ui --mlflow-port 7", "infra.services ui --mlflow-port 7"),
        ("up", "infra.services up"),
        ("status", "infra.services status"),
        ("down", "infra.services down"),
        ("push --history", "infra.remote push --history"),
        ("pull", "infra.remote pull"),
        ("secrets", "infra.secrets"),
    ],
)
def test_flows_and_servers_are_programs_that_replace_the_command(
    words: str, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def execv(path: str, arguments: list[str]) -> None:
        started.extend(arguments)
        raise SystemExit

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("os.environ", {"PATH": "/bin"})
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr("sys.argv", ["dgpo", *words.split()])
    with pytest.raises(SystemExit):
        typer.main.get_command(cli.app)(words.split())
    assert started == [sys.executable, "-m", *program.replace("PYTHON", sys.executable).split()]
    assert os.environ["PREFECT_HOME"] == str(ROOT / ".prefect")
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/bin"


def test_a_program_gets_the_options_of_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("sys.argv", ["flows.reproduce", "--seed", "0", "1", "--recipe", "kd", "--seed", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.run_as("reproduce", lambda **options: given.update(options))
    assert ended.value.code == 0
    assert [*given["seed"]] == [0, 1, 2] and [*given["recipe"]] == ["kd"] and given["max_parallel"] == 2


def test_show_prints_the_results_or_says_what_to_do(tmp_path: Path) -> None:
    missing = dgpo(tmp_path, "show")
    assert missing.returncode == 2
    assert missing.stderr.strip() == (
        "error: reports/results.json: no results yet; run the pipeline first (`make demo`)"
    )
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"kd": {"nq": {"em": 0.25, "ci95": [0.2, 0.3], "n": 9}}}))
    done = dgpo(tmp_path, "show", "results.json")
    assert done.returncode == 0 and "0.250 (0.20-0.30)" in done.stdout


def test_use_writes_the_parameters_of_a_profile(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.yaml").write_text("seed: 7\n")
    done = dgpo(tmp_path, "use", "mine", "taid")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "params.yaml").read_text()
    assert "seed: 7" in text and "taid:" in text
    assert dgpo(tmp_path, "use", "yours").stderr.strip() == (
        "error: profiles/yours.yaml: no such profile; there are: mine"
    )


@pytest.mark.thorough
def test_another_folder_than_a_checkout_is_said_and_left_as_it_is(tmp_path: Path) -> None:
    for command in (["lineage"], ["ask", "Who"], ["register"], ["serve"], ["collections", "list"]):
        done = dgpo(tmp_path, *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: {tmp_path} is no checkout (it has no params.yaml): run it in the checkout's root\n"
        )
    assert dgpo(tmp_path, "plan").stderr.startswith(
        "error: params.yaml: no such file; run it in the checkout"
    )
    assert dgpo(tmp_path, "ask", "--help").returncode == 0
    assert dgpo(tmp_path, "--version").stdout.startswith("dgpo ")
    assert list(tmp_path.iterdir()) == [], "a store, say"


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").mkdir()
    for command in (["plan"], ["show", "params.yaml"]):
        done = dgpo(tmp_path, *command)
        assert done.returncode == 2
        assert done.stderr == "error: params.yaml: cannot be read (Is a directory)\n"


def test_what_is_wrong_with_a_question_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("")
    assert dgpo(tmp_path, "ask", " ").stderr == "error: the question is empty\n"
    assert dgpo(tmp_path, "serve", "--allow-origin", "http://localhost:3000/").stderr == (
        "error: --allow-origin http://localhost:3000/: scheme, host and port without a path, such as "
        "http://localhost:3000\n"
    )
    odd = {"DGPO_API_KEY": "two words"}
    assert dgpo(tmp_path, "serve", **odd).stderr == "error: DGPO_API_KEY: only visible ASCII characters\n"
    assert (
        "--allow-host http://x: a name without" in dgpo(tmp_path, "serve", "--allow-host", "http://x").stderr
    )


def test_shells_complete_commands(tmp_path: Path) -> None:
    words = {"_DGPO_COMPLETE": "complete_bash", "COMP_WORDS": "dgpo re", "COMP_CWORD": "1"}
    program = "import sys; sys.argv[0] = 'dgpo'; from tasks.commands.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), **words}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "retriever" in done.stdout.split(), done.stderr


def test_a_closed_output_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"kd": {"nq": {"em": 0.25}}}')
    command = f"exec {sys.executable} -m tasks.commands.cli show results.json >&-"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_the_environment_a_program_says_what_to_do(tmp_path: Path) -> None:
    """With a Python that has no packages, as the system's may be."""
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    for program in ("tasks.stages.data", "tasks.commands.cli", "flows.pipeline"):
        command = [sys.executable, "-S", "-m", program]  # -S: no site-packages
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"error: {sys.executable} does not have pydantic, rich" in done.stderr
        assert "source .venv/bin/activate" in done.stderr and done.stderr.count("\n") == 1
