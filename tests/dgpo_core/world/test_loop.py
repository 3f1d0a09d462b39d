"""Building base models: the weighted loss, and a killed build."""

import math
import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dgpo_core.config.data import PhaseConfig
from dgpo_core.errors import NotFinite
from dgpo_core.training.checkpoint import Checkpoint
from dgpo_core.world import pretraining as loop
from dgpo_core.world.lessons import Example
from dgpo_core.world.pretraining import _backward, train_on_examples, weighted_loss
from tests.dgpo_core.making import tiny_model


def examples(step: int) -> list[Example]:
    rng = random.Random(step)
    lengths = [rng.randint(2, 9) for _ in range(4)]
    return [
        Example(
            [rng.randrange(200) for _ in range(n)],
            [rng.choice([0.0, 0.5, 1.0]) for _ in range(n - 1)] + [1.0],
        )
        for n in lengths
    ]


def test_weighted_loss(model: PreTrainedModel) -> None:
    total = weight = 0.0
    for example in examples(0):
        with torch.no_grad():
            table = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        for position in range(1, len(example.ids)):
            total -= example.weights[position] * float(table[position - 1, example.ids[position]])
            weight += example.weights[position]
    exact, narrow = (weighted_loss(model, examples(0), p).item() for p in ("float32", "bfloat16"))
    assert exact == pytest.approx(total / weight, rel=1e-5)
    assert narrow == pytest.approx(total / weight, rel=0.02)
    assert narrow != exact


@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_examples_at_a_time_give_the_same_gradient(
    rows: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    def gradient(rows: int) -> tuple[float, torch.Tensor]:
        model = tiny_model(tokenizer, 3)
        loss = _backward(model, examples(0), rows, "float32")
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (loss, whole), (loss_in_parts, parts) = gradient(4), gradient(rows)
    assert loss_in_parts == pytest.approx(loss, rel=1e-5)
    assert torch.nn.functional.cosine_similarity(whole, parts, dim=0) > 0.99999
    assert float(parts.norm()) == pytest.approx(float(whole.norm()), rel=1e-4)


def test_killed_build_continues_exactly(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 2)
    config = PhaseConfig(kind="reading", steps=5, batch_size=4, learning_rate=1e-2, warmup_steps=2)

    reported: list[int] = []

    def build(name: str, kill_at: float = math.inf) -> PreTrainedModel:
        model = tiny_model(tokenizer, 3)
        reported.clear()

        def report(step: int, metrics: dict[str, float]) -> None:
            reported.append(step)
            if step == kill_at:
                raise KeyboardInterrupt

        train_on_examples(model, config, examples, Checkpoint(tmp_path / name), report, 3, "bfloat16")
        return model

    whole = build("whole").state_dict()
    with pytest.raises(KeyboardInterrupt):
        build("killed", 3)
    resumed = build("killed").state_dict()
    assert reported == [2, 3, 4, 5]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    finished = build("killed").state_dict()
    assert reported == [5]  # a finished phase still counts in the progress
    assert all(torch.equal(finished[name], value) for name, value in whole.items())


def test_a_rate_that_is_too_high_ends_the_build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = PhaseConfig(kind="reading", steps=5, batch_size=4, learning_rate=1e30, matrix_learning_rate=1e30)
    with pytest.raises(NotFinite, match=r"the (loss|grad_norm) of step \d .*lower learning_rate or matrix_"):
        train_on_examples(
            tiny_model(tokenizer, 3), config, examples, Checkpoint(tmp_path), lambda *_: None, 3, "float32"
        )
