"""What `dgpo secrets` writes; and that no secret is in the repository."""

import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from infra.secrets import GENERATED, main, write
from tests.conftest import ROOT, git

# Forms of keys that are unmistakable, and a value given to a name that says what it is.
KNOWN = {
    "private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{22,}\b",
    "Google key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "Hugging Face token": r"\bhf_[A-Za-z]{30,}\b",
    "Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b",
    "web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.",
    "password in a URL": r"\b[a-z][a-z0-9+]*://[^/\s:@\"'`{}$<]+:(?P<value>[^/\s@\"'`{}$<]+)@",
    "assignment": (
        r"(?i)(?:passw(?:or)?d|secret|api_?key|auth_string|access_?key|token)[\"']?\s*[:=]\s*[\"']?"
        r"(?P<value>[A-Za-z0-9+/_-]{20,})"
    ),
}
RANDOM = 3.5  # bits a character; English words and names of variables have less


def entropy(text: str) -> float:
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def findings(text: str) -> list[str]:
    found = []
    for kind, pattern in KNOWN.items():
        for match in re.finditer(pattern, text):
            value = match.groupdict().get("value")
            mixed = value is None or (entropy(value) > RANDOM and any(c.isdigit() for c in value))
            if kind == "password in a URL" or mixed:
                found.append(f"{kind}: line {text[: match.start()].count(chr(10)) + 1}")
    return found


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN OPENSSH PRIVATE " + "KEY-----",
        "key = AKIA" + "ABCDEFGHIJKLMNOP",
        "postgresql://me:hunter2" + "@db/x",
        "MLFLOW_ADMIN_PASSWORD=" + "s3Kv9_xQpL0aZt7-WmB4cYhN2eRj",
    ],
)
def test_the_search_finds_secrets(text: str) -> None:
    assert findings(text)


def test_the_repository_has_no_secrets() -> None:
    found = {}
    for name in filter(None, git("ls-files", "-z", cwd=ROOT).split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # weights and pictures
        if what := findings(text):
            found[name] = what
    assert not found


def test_what_holds_secrets_is_ignored_by_git() -> None:
    names = ["infra/.env", "infra/.env.part", ".dvc/config.local", ".services/mlflow.json"]
    names.append(".prefect/prefect.db")
    assert git("check-ignore", *names, cwd=ROOT).splitlines() == names
    assert not git("ls-files", *names, cwd=ROOT)


def test_they_are_written_once_for_their_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert write(file) == list(GENERATED)
    assert file.stat().st_mode & 0o777 == 0o600
    first = file.read_text()
    file.chmod(0o644)
    assert write(file) == []
    assert file.read_text() == first
    assert file.stat().st_mode & 0o777 == 0o600
    values = [line.split("=", 1)[1] for line in first.splitlines() if "=" in line and "DGPO" not in line]
    assert len(set(values)) == len(values)
    assert all(len(value) >= 43 for value in values)


def test_what_a_newer_version_needs_is_added(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("POSTGRES_PASSWORD=mine")
    assert "POSTGRES_PASSWORD" not in write(file)
    lines = file.read_text().splitlines()
    assert lines[0] == "POSTGRES_PASSWORD=mine"
    assert {line.split("=")[0] for line in lines} == set(GENERATED)


def test_nothing_secret_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("infra.secrets.write.__defaults__", (tmp_path / ".env",))
    assert main() == 0
    printed = capsys.readouterr().out
    for line in (tmp_path / ".env").read_text().splitlines():
        name, _, value = line.partition("=")
        assert name.startswith(("#", "DGPO_")) or not value or value not in printed


def test_it_needs_nothing_that_is_not_in_python() -> None:
    code = "import sys, infra.secrets; print({'typer', 'pydantic', 'dgpo_core'} & set(sys.modules))"
    environment = {"PATH": os.environ["PATH"]}
    said = subprocess.check_output([sys.executable, "-S", "-c", code], cwd=ROOT, text=True, env=environment)
    assert said.strip() == "set()"
