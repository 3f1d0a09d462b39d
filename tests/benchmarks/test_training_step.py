"""The plan's formulas against torch's FLOP counter and what autograd keeps, on small models."""

import pytest

from benchmarks import training_step as step
from dgpo_core.planning.shapes import Architecture

CONFIG = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 700,
}


@pytest.mark.parametrize("setting", list(step.SETTINGS))
@pytest.mark.parametrize(
    ("family", "tied", "precision"), [("qwen2", True, "bfloat16"), ("llama", False, "float32")]
)
def test_parameters_flops_and_activations(
    family: str, tied: bool, precision: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "LoRA" in setting:
        pytest.importorskip("peft", reason="LoRA needs the extra gpu")
    monkeypatch.setattr(step, "LENGTH", 160)
    monkeypatch.setattr(step, "COUNTED", 40)
    config = CONFIG | {"model_type": family, "tie_word_embeddings": tied}
    compute = step.compute_of(precision, setting)
    planned = step.estimate(Architecture.from_config(config), compute)
    measured = step.measure(config, compute)
    assert planned["parameters"] == measured["parameters"]
    assert planned["flops"] == pytest.approx(measured["flops"], rel=1e-3)
    assert planned["saved"] == pytest.approx(measured["saved"], rel=0.03)
