"""Building the student and the teacher side by side: reproducible, resumable, and no orphan at work."""

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgpo_core.config.data import BaseModelsConfig, ModelShape, PhaseConfig, WorldConfig
from dgpo_core.config.protocol import ProtocolConfig
from dgpo_core.training import pretrain
from dgpo_core.training.base_models import BaseModelBuilder, Report
from dgpo_core.training.models import load_model, load_tokenizer

READING = PhaseConfig(kind="reading", steps=4, batch_size=2, warmup_steps=1)
CONFIG = BaseModelsConfig(
    world=WorldConfig(passages=150),
    worlds=1,
    expert_episodes=12,
    student=ModelShape(hidden_size=16, layers=1, heads=2, intermediate_size=16),
    teacher=ModelShape(hidden_size=24, layers=1, heads=2, intermediate_size=24),
    student_phases=[READING],
    teacher_phases=[READING, PhaseConfig(kind="protocol", steps=3, batch_size=2, warmup_steps=1)],
)


def build(path: Path, report: Report) -> dict[str, dict[str, torch.Tensor]]:
    protocol = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=80)
    BaseModelBuilder(CONFIG, protocol, 3, path / "state", report).build(path / "base")
    return {name: load_file(path / "base" / name / "model.safetensors") for name in ("student", "teacher")}


def ignore(phase: str, step: int, metrics: dict[str, float]) -> None:
    pass


def same(first: dict[str, dict[str, torch.Tensor]], second: dict[str, dict[str, torch.Tensor]]) -> bool:
    return all(
        torch.equal(weights, second[model][name]) for model in first for name, weights in first[model].items()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, build(folder, ignore)


def test_models_load_with_plain_transformers(
    whole: tuple[Path, dict[str, dict[str, torch.Tensor]]],
) -> None:
    folder, _ = whole
    for name, width in (("student", 16), ("teacher", 24)):
        model = load_model(str(folder / "base" / name))
        assert model.config.hidden_size == width
        assert model.config._attn_implementation == "sdpa"  # how it was built is not how it is used
        assert len(load_tokenizer(str(folder / "base" / name))) == model.config.vocab_size


@pytest.mark.parametrize("victim", ["student-0-reading", "teacher-1-protocol"])
def test_killed_build_continues_to_the_same_weights(
    whole: tuple[Path, dict[str, dict[str, torch.Tensor]]],
    victim: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    seen: list[tuple[str, int]] = []

    def kill(phase: str, step: int, metrics: dict[str, float]) -> None:
        seen.append((phase, step))
        if (phase, step) == (victim, 3):
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, kill)
    assert threading.active_count() == before  # the other model's thread has ended too
    assert not (tmp_path / "base").exists()
    again: list[tuple[str, int]] = []
    resumed = build(tmp_path, lambda phase, step, metrics: again.append((phase, step)))
    assert same(whole[1], resumed)
    assert (victim, 1) not in again  # it went on from the checkpoint after step 2
    assert (victim, 1) in seen
