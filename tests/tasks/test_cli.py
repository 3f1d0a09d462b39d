"""The command `dgpo`, run as its users run it."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def dgpo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tasks.cli", *arguments]
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "COLUMNS": "100"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, tasks.cli; print([m for m in ('torch', 'mlflow', 'prefect', 'dvc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


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
