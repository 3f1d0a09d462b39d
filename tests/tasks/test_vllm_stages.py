"""Reinforcement learning whose episodes vLLM generates: the real program, on the CPU (`make test-vllm`)."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tasks.data import generate
from tasks.index import index
from tests.tasks.miniature import ROOT, make_project

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM has an environment of its own"),
]


def test_reinforcement_learning_with_vllm(workplace: Path) -> None:
    make_project(
        workplace,
        ["no_cold_start"],
        rollout={
            "engine": "vllm",
            "vllm": {"gpu_memory_utilization": 0.2, "eager": True},
            "probe": {"tolerance": 1e-3},
        },
        reinforce={"steps": 3, "old_logprobs": "trainer", "importance_cap": 2.0},
        questions={"train": ["onehop"]},
    )
    generate()
    index()
    command = [sys.executable, "-m", "tasks.reinforce", "no_cold_start"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(csv.DictReader(Path("plots/reinforce-no_cold_start.csv").read_text().splitlines()))
    assert len(rows) == 3
    for row in rows:  # refreshed before each step: after the first the weights are others
        assert 0 <= float(row["engine_gap_mean"]) <= float(row["engine_gap_max"]) < 1e-3
        assert float(row["engine_ratio"]) == pytest.approx(1, abs=1e-3)
        assert float(row["gate_excluded"]) == 0
    assert not Path(".state/weights").is_dir() or not list(Path(".state/weights").iterdir())
    assert "dev_em" in json.loads(Path("metrics/reinforce-no_cold_start.json").read_text())
    start, end = (
        load_file(folder / "model.safetensors")
        for folder in (ROOT / "models/student", Path("models/no_cold_start"))
    )
    name = "model.layers.0.mlp.down_proj.weight"
    assert (start[name] - end[name]).abs().max() > 1e-5
