"""Secrets of the environment reach no log, file or store: of runs that succeed, and of runs that fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_store
from tests.tasks.miniature import change_params, make_project

pytestmark = pytest.mark.thorough

SECRETS = {
    name: f"hidden-{number}-{name.lower().replace('_', '-')}"
    for number, name in enumerate(
        [
            "DGPO_API_KEY", "DGPO_RETRIEVER_KEY", "QDRANT_API_KEY", "OPENAI_API_KEY", "HF_TOKEN",
            "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY",
        ]
    )
}  # fmt: skip
IN_URL = "hidden-in-url"
# the last one fails: nobody listens there, and the address has a password
RUNS = [
    (["data"], {}, 0),
    (["index"], {}, 0),
    (["teach"], {}, 0),
    (["filter"], {}, 0),
    (["teach"], {"MLFLOW_TRACKING_URI": f"http://user:{IN_URL}@127.0.0.1:9"}, 0),
    (["index"], {"HTTPS_PROXY": f"http://user:{IN_URL}@127.0.0.1:9"}, 0),
]


def run(folder: Path, words: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, **SECRETS, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def holders(folder: Path) -> list[str]:
    """Which files, those of stores and links included, have a secret, as `file: secret`."""
    secrets = [*SECRETS.values(), IN_URL]
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            content = path.read_bytes()
            found += [f"{path}: {secret}" for secret in secrets if secret.encode() in content]
    return found


def test_no_log_file_or_store_has_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    make_project(tmp_path, teach={"questions": 8, "chunk": 8})
    said = []
    for words, environment, status in RUNS:
        done = run(tmp_path, [f"tasks.stages.{words[0]}", *words[1:]], **environment)
        assert done.returncode == status, done.stderr
        said.append(done.stdout + done.stderr)
    # what fails, with an address that has a password, and with a service that is not there
    for location in (
        f"http://user:{IN_URL}@127.0.0.1:9",
        "http://127.0.0.1:9",
        "retriever+http://127.0.0.1:9",
    ):
        change_params(tmp_path, retrieval={"location": location})
        done = run(tmp_path, ["tasks.stages.index"])
        assert done.returncode in (1, 2)
        said.append(done.stdout + done.stderr)
    change_params(
        tmp_path, retrieval={"location": "embedded"}, models={"teacher": "openai:m@http://127.0.0.1:9/v1"}
    )
    for words in (
        ["tasks.stages.teach"],
        ["tasks.commands.cli", "doctor"],
        ["tasks.commands.cli", "ask", "Who"],
    ):
        done = run(tmp_path, words)
        assert done.returncode != 0
        said.append(done.stdout + done.stderr)
    (tmp_path / "said.log").write_text("\n".join(said))
    assert "127.0.0.1:9" in (tmp_path / "said.log").read_text(), "the failures were those that are meant"
    (tmp_path / "params.yaml").unlink()  # where the test itself has written none, but might
    assert holders(tmp_path) == []
