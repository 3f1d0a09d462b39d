"""The benchmark of a whole DGPO step, at tiny shapes on the processor."""

import pytest
import torch

from benchmarks.dgpo_step import Settings, make_episodes, parse, run
from dgpo_core.agent.episode import Owner
from dgpo_core.planning.shapes import table

TINY = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> Settings:
    entries = table()
    for name, config in (("small", TINY), ("large", TINY | {"hidden_size": 64, "vocab_size": 320})):
        monkeypatch.setitem(entries, name, {"repositories": [], "tokens": 300, "config": config})
    return Settings(
        "small", "large", episodes=6, mini_batch=3, micro_batch_tokens=512, steps=1, device="cpu", scale=0.05
    )


@pytest.mark.parametrize("rollout", ["none", "transformers"])
def test_a_step_is_timed_part_by_part(tiny_shapes: Settings, rollout: str) -> None:
    torch.manual_seed(0)
    settings = Settings(**{**vars(tiny_shapes), "rollout": rollout})
    result = run(settings)
    seconds = result["seconds"]
    parts = ("policy log-probabilities", "teacher", "actor gradient", "critic gradient")
    assert all(seconds[part] > 0 for part in parts)
    assert sum(seconds[part] for part in parts) <= seconds["step"]
    assert seconds["experience"] + seconds["update"] == pytest.approx(seconds["step"], rel=0.05)
    assert 0 < result["teacher_share"] < 1 and result["micro_batch_tokens"] == 512
    assert ("rollout" in result) == (rollout == "transformers")


def test_episodes_are_the_same_for_a_seed_and_have_the_lengths_of_real_ones() -> None:
    episodes = make_episodes(Settings(episodes=200), 1000)
    assert episodes == make_episodes(Settings(episodes=200), 1000)
    sizes = [len(e.token_ids) for e in episodes]
    assert max(sizes) <= 4096 and 1000 < sum(sizes) / len(sizes) < 2000
    assert all(e.owners[-1] == Owner.MODEL and e.owners[0] == Owner.PROMPT for e in episodes)


def test_arguments() -> None:
    made = parse(["--episodes", "64", "--rollout", "transformers", "--shrink", "2"])
    assert made == Settings(episodes=64, rollout="transformers", shrink=2)
