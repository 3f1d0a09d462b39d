"""The harness that kills: what it must notice, and a few of its cases (the nightly runs hundreds)."""

import sys
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos import Chaos, Work

# reads what an earlier attempt has left, as a stage does; `{}` is what it writes in the end
TOY = """
import os, sys
from pathlib import Path
progress = Path("progress")
for step in range(int(progress.read_text()) if progress.exists() else 0, 10):
    sum(range(2_000_000))
    Path("progress.new").write_text(str(step + 1))
    os.replace("progress.new", "progress")
Path("out.new").write_text({})
os.replace("out.new", "out")
progress.unlink()
"""
HALF = TOY.replace("for step", "Path('out').write_text('half')\nfor step")
NEVER = "import os, sys; from pathlib import Path\nsys.exit(3) if Path('again').exists() else None\n"
NEVER += TOY.replace("for step", "Path('again').touch()\nfor step")


def outcome(folder: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the harness says of a program that it kills."""
    monkeypatch.setattr(chaos, "WORKS", {"toy": Work(("-S", "-c", program), ("out",))})
    harness = Chaos(folder / "chaos", 0, ["toy"], ["SIGKILL"])
    harness.start()
    (folder / "chaos/reference/again").unlink(missing_ok=True)
    found: list[chaos.Case] = []
    harness.run(2, lambda case, _: found.append(case))
    assert [case.number for case in harness.cases()] == list(range(len(found)))
    assert sum(case.kills for case in found) >= 2
    return next((case.wrong for case in found if case.wrong), "identical")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (TOY.format("'whole'"), "identical"),
        (TOY.format("str(os.getpid())"), "out differs"),
        (HALF.format("'whole'"), "out differs"),
        (NEVER.format("'whole'"), "started again it ended with 3"),
    ],
)
@pytest.mark.thorough
def test_what_it_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, said: str) -> None:
    assert outcome(tmp_path, program, monkeypatch) == said


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    """Data, index and its load on disk, run once undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        early = ("given", "data", "index", "index load")
        patch.setattr(chaos, "WORKS", {name: chaos.WORKS[name] for name in early})
        made = Chaos(tmp_path_factory.mktemp("chaos"), 0, list(early), ["SIGKILL", "file size", "memory"])
        made.start()
    return made


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
@pytest.mark.parametrize(
    ("work", "fault"), [("data", "file size"), ("index", "memory"), ("index load", "SIGKILL")]
)
def test_a_disturbed_stage_ends_with_the_same_bytes(harness: Chaos, work: str, fault: str) -> None:
    numbers = (number for number in range(100) if harness.drawn(number) == (work, fault))
    case = harness.play(next(numbers))
    assert case.wrong == ""
