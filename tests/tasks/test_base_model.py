"""Stage `base-model`: what an interrupted build continues with."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo_core.pretraining import loop
from tasks.base_model import build
from tasks.stage import STATE, Run
from tests.tasks.miniature import make_project

PHASE = {"batch_size": 2, "warmup_steps": 1}
SMALL = {
    "shape": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16},
    "phases": [{"kind": "reading", "steps": 2, **PHASE}, {"kind": "protocol", "steps": 4, **PHASE}],
}
WEIGHTS = Path("models/small/model.safetensors")


def use(top_k: int) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["retrieval"]["top_k"] = top_k
    Path("params.yaml").write_text(yaml.safe_dump(params))


def test_a_build_does_not_continue_with_episodes_of_other_passages(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was killed in the protocol phase, and then retrieval.top_k is changed."""
    base = {"world": {"passages": 150}, "worlds": 1, "expert_episodes": 12, "models": {"small": SMALL}}
    make_project(workplace, base_models=base)
    use(top_k=1)
    build("small")
    expected = WEIGHTS.read_bytes()
    WEIGHTS.unlink()
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    progress = Run.progress

    def kill(self: Run, done: float, total: float, unit: str = "", **values: Any) -> None:
        progress(self, done, total, unit, **values)
        if done == 5:  # the third step of the protocol phase, after its checkpoint
            raise KeyboardInterrupt

    use(top_k=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "progress", kill)
        build("small")
    assert (STATE / "base-model@small/1-protocol").exists()
    use(top_k=1)
    build("small")
    assert WEIGHTS.read_bytes() == expected
