"""Reinforcement learning whose episodes vLLM generates: the real program, on the CPU (`make test-vllm`)."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.stages.data import generate
from tasks.stages.index import index
from tests.tasks.miniature import ROOT, curves, make_project
from tests.vllm_server import serving

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM has an environment of its own"),
]


def project(folder: Path, compute: dict[str, Any], rollout: dict[str, Any], overlap: bool = False) -> None:
    """Three steps of DGPO from the raw student on one-hop questions."""
    make_project(
        folder,
        ["no_cold_start"],
        compute=compute,
        rollout={"probe": {"tolerance": 1e-3}, **rollout},
        reinforce={"steps": 3, "old_logprobs": "trainer", "importance_cap": 2.0, "overlap": overlap},
        questions={"train": ["onehop"]},
    )
    generate()
    index()


def trained(folder: Path) -> list[dict[str, float]]:
    """Run the stage in `folder`; its curves."""
    command = [sys.executable, "-m", "tasks.stages.reinforce", "no_cold_start"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return curves("reinforce-no_cold_start", folder)


def weights(model: Path) -> torch.Tensor:
    return load_file(model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("overlap", [False, True])
def test_reinforcement_learning_with_vllm(workplace: Path, overlap: bool) -> None:
    engine = {"engine": "vllm", "vllm": {"gpu_memory_utilization": 0.2, "eager": True}}
    project(workplace, {"device": "cpu"}, engine, overlap)
    rows = trained(workplace)
    assert len(rows) == 3
    for row in rows[
        : 1 if overlap else 3
    ]:  # refreshed before each step: after the first the weights are others
        assert 0 <= row["engine_gap_mean"] <= row["engine_gap_max"] < 1e-3
    if overlap:
        assert all(row["engine_gap_max"] > 1e-3 for row in rows[1:]), "sampled with weights of a step ago"
    for row in rows:
        assert row["engine_ratio"] == pytest.approx(1, abs=0.1 if overlap else 1e-3)
        assert row["gate_excluded"] == 0
    assert not Path(".state/weights").is_dir() or not list(Path(".state/weights").iterdir())
    assert "dev_em" in json.loads(Path("metrics/reinforce-no_cold_start.json").read_text())
    moved = (weights(ROOT / "models/student") - weights(Path("models/no_cold_start"))).abs().max()
    assert moved > 1e-5


def test_two_processes_ask_a_server_as_one_does(workplace: Path) -> None:
    found = {}
    for processes in (1, 2):
        folder = workplace / str(processes)
        folder.mkdir()
        with (
            pytest.MonkeyPatch.context() as patch,
            serving(ROOT / "models/student", workplace / f"server-{processes}.log") as url,
        ):
            patch.chdir(folder)
            project(folder, {"processes": processes}, {"engine": "vllm-server", "server": {"student": [url]}})
            found[processes] = trained(folder)
    for one, two in zip(found[1], found[2], strict=True):
        assert two["engine_gap_max"] < 1e-3
        assert two == pytest.approx(one, rel=1e-3, abs=1e-3, nan_ok=True)
    difference = weights(workplace / "1/models/no_cold_start") - weights(workplace / "2/models/no_cold_start")
    assert difference.abs().max() < 1e-4
