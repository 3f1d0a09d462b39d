"""Building base models: reproducible, resumable, of either architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dgpo_core.config.agent import ProtocolConfig
from dgpo_core.config.data import BaseModelConfig, BaseModelsConfig, ModelShape, PhaseConfig, WorldConfig
from dgpo_core.models import load_model, load_tokenizer
from dgpo_core.world import pretraining as loop
from dgpo_core.world.pretraining import BaseModelBuilder, Report

READING = PhaseConfig(kind="reading", steps=4, batch_size=2, warmup_steps=1)
PROTOCOL = PhaseConfig(kind="protocol", steps=3, batch_size=2, warmup_steps=1)
STUDENT = ModelShape(hidden_size=16, layers=1, heads=2, intermediate_size=16)
TEACHER = ModelShape(hidden_size=24, layers=1, heads=2, intermediate_size=24)
CONFIG = BaseModelsConfig(
    world=WorldConfig(passages=150),
    worlds=1,
    expert_episodes=12,
    models={
        "student": BaseModelConfig(shape=STUDENT, phases=[READING]),
        "teacher": BaseModelConfig(shape=TEACHER, phases=[READING, PROTOCOL]),
        "llama": BaseModelConfig(
            shape=STUDENT.model_copy(update={"architecture": "llama"}), phases=[READING]
        ),
    },
)
Weights = dict[str, torch.Tensor]


def build(path: Path, name: str, report: Report) -> Weights:
    protocol = ProtocolConfig(instruction="short", max_context=1024, max_new_tokens=80)
    BaseModelBuilder(CONFIG, protocol, 3, path / "state", report).build(name, path / name)
    return load_file(path / name / "model.safetensors")


def ignore(phase: str, step: int, metrics: dict[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Weights]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, {name: build(folder / f"of-{name}", name, ignore) for name in CONFIG.models}


@pytest.mark.parametrize(
    ("name", "width", "kind"),
    [("student", 16, "qwen2"), ("teacher", 24, "qwen2"), ("llama", 16, "llama")],
)
def test_models_load_with_plain_transformers(
    whole: tuple[Path, dict[str, Weights]], name: str, width: int, kind: str
) -> None:
    folder = whole[0] / f"of-{name}" / name
    model = load_model(str(folder))
    assert (model.config.hidden_size, model.config.model_type) == (width, kind)
    assert model.config._attn_implementation == "sdpa"  # how it was built is not how it is used
    assert len(load_tokenizer(str(folder))) == model.config.vocab_size


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_killed_build_continues_to_the_same_weights(
    whole: tuple[Path, dict[str, Weights]], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    victim = f"{len(CONFIG.models[name].phases) - 1}-{CONFIG.models[name].phases[-1].kind}"
    threads = torch.get_num_threads()

    def kill(phase: str, step: int, metrics: dict[str, float]) -> None:
        assert torch.get_num_threads() == 1
        if (phase, step) == (victim, 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, name, kill)
    assert torch.get_num_threads() == threads
    assert not (tmp_path / name).exists()
    again: list[tuple[str, int]] = []
    resumed = build(tmp_path, name, lambda phase, step, metrics: again.append((phase, step)))
    expected = whole[1][name]
    assert all(torch.equal(resumed[key], weights) for key, weights in expected.items())
    # finished phases are told of once, and the victim went on from the checkpoint after step 2
    assert (victim, 1) not in again and (victim, 3) in again
