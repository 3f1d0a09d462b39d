"""The script for a GPU, on a processor: all parts run, one that fails loses nothing, figures are right."""

import json
import sys

import pytest

from benchmarks.gpu import PARTS, SMOKE, Row, report, run_part

OPTIONAL = ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "flash-attn", "Liger")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.thorough
def test_every_part_runs(part: str) -> None:
    rows = PARTS[part][0](SMOKE)
    needed = [row for row in rows if not any(name in row.what for name in OPTIONAL)]
    assert needed and all(row.seconds > 0 and not row.left_out for row in needed)
    assert json.loads(json.dumps([vars(row) for row in rows])) == [vars(row) for row in rows]
    assert all(row.what.split("|")[0] in report({part: rows}, "processor") for row in rows)


def test_all_parts_together_take_at_most_eight_minutes() -> None:
    assert sum(limit for _, limit in PARTS.values()) <= 480


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(60)", "not done in 1 s"),
        ("print('[]'); raise ValueError('no memory')", "ValueError: no memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "exit code -11"),
    ],
)
def test_a_part_that_fails_is_left_out(program: str, said: str) -> None:
    assert run_part([sys.executable, "-c", program], 1) == [Row("all of it", left_out=said)]


def test_figures() -> None:
    """989 TFLOPs a second are an H100's peak; 2 s of 10 are the teacher's, beside 6 s of rollouts."""
    rows = [Row("update", 2.0, 3000, 791.2e12), Row("teacher", 2.0, 1), Row("step, passes of 8 tokens", 10.0)]
    text = report({"step": rows, "rollout": [Row("rollouts, x", 6.0)]}, "NVIDIA H100 80GB HBM3")
    assert "| update | 2.000 | 1,500 | 396 | 40.0% |  |" in text
    assert "The teacher adds 14.3% to a step with its rollouts." in text
    assert "utilisation" in report({}, "NVIDIA L4") and "|  |" in report({"a": [rows[0]]}, "processor")
