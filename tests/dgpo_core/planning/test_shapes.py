"""Parameters by formula against transformers' own models; where a shape comes from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dgpo_core.errors import UserError
from dgpo_core.planning.shapes import Architecture, architecture_of, table

ROOT = Path(__file__).parents[3]
PUBLISHED_PARAMETERS = {  # the hub's model cards
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
    "e5-base": 109_482_240,
}


def built(config: dict[str, Any]) -> Any:
    """The model without memory for its weights."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        kind: Any = AutoModel if config["model_type"] == "bert" else AutoModelForCausalLM
        return kind.from_config(AutoConfig.for_model(config["model_type"], **values))


@pytest.mark.parametrize("name", list(table()))
def test_parameters_are_those_of_transformers_and_of_the_published_model(name: str) -> None:
    config = table()[name]["config"]
    shape = Architecture.from_config(config)
    assert shape.parameters == sum(p.numel() for p in built(config).parameters())
    assert shape.parameters == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_any_shape_of_the_families(family: str, tied: bool) -> None:
    config = {
        "model_type": family,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,  # wider than hidden_size / heads
        "intermediate_size": 100,
        "vocab_size": 321,
        "tie_word_embeddings": tied,
    }
    model, shape = built(config), Architecture.from_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.backbone == sum(p.numel() for p in model.base_model.parameters())
    layers = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    assert shape.matrices == sum(p.numel() for p in layers)


def test_shapes_of_folders_and_of_published_models(tmp_path: Path) -> None:
    weights = ROOT / "models/student"
    model = AutoModelForCausalLM.from_pretrained(weights)
    assert architecture_of(str(weights)).parameters == sum(p.numel() for p in model.parameters())
    assert architecture_of("omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct") == architecture_of(
        "Qwen/Qwen2.5-3B-Instruct"
    )
    with pytest.raises(UserError, match="somebody/model: neither a model folder nor"):
        architecture_of("somebody/model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type 'mamba' is unknown here"):
        architecture_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="hidden_size"):
        architecture_of(str(tmp_path))
