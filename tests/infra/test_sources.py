"""What holds for all sources: their length, and what they depend on."""

import re
import subprocess
import tomllib
from pathlib import Path

from tests.conftest import ROOT

LONGEST = 600  # lines of a file that is read as one thing


def sources(*packages: str) -> list[Path]:
    """What git tracks, because a working tree may have more in it."""
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    paths = [Path(line) for line in listed.stdout.splitlines()]
    return [path for path in paths if not packages or path.parts[0] in packages]


def test_no_file_is_too_long() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert lengths and {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_every_dependency_is_named_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = [name(requirement) for requirement in project["dependencies"]]
    assert [each for each in sorted(set(always)) if always.count(each) > 1] == []
    for extra, requirements in project["optional-dependencies"].items():
        again = [each for each in requirements if "[" not in each and name(each) in always]
        assert again == [], extra


def name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found[0]).lower()
