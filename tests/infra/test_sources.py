"""What holds for all sources: their length, and what they depend on."""

import re
import tomllib
from pathlib import Path

from tests.conftest import ROOT, git

LONGEST = 600  # lines of a file that is read as one thing


def sources() -> list[Path]:
    """List what git tracks, because a working tree may have more in it."""
    return [Path(line) for line in git("ls-files", "*.py", cwd=ROOT).splitlines()]


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


def test_nothing_runs_what_it_reads() -> None:
    """No pickle but of vLLM's own handles, no code of the hub, no archive unpacked where its names say."""
    doors = re.compile(
        r"torch\.load\(|pickle\.loads?\(|trust_remote_code=True|weights_only=False|\.extractall\(|"
        r"yaml\.(unsafe_)?load\(|\beval\(|\bexec\(|allow_pickle=True|verify=False"
    )
    ours = [path for path in sources() if path.parts[0] in ("dgpo_core", "tasks", "flows", "infra")]
    found = [(str(path), hit[0]) for path in ours if (hit := doors.search((ROOT / path).read_text()))]
    assert ours and [(path, hit) for path, hit in found if hit != "eval("] == []
    assert not any(re.search(r"(?<![.\w])eval\(", (ROOT / path).read_text()) for path, hit in found)
