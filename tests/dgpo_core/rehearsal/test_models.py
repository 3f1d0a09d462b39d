"""Scaled-down models keep what breaks runs: grouped queries, tied embeddings, padding rows."""

from typing import Any

import pytest
import torch

from dgpo_core.planning.architectures import config_of
from dgpo_core.rehearsal.models import build_tokenizer, learn_by_heart, random_model, scaled_config
from dgpo_core.training.batches import TokenSequence, head_of
from tests.dgpo_core.rehearsal.test_tokenizers import TEXTS

STUDENT, TEACHER = "Qwen/Qwen2.5-0.5B-Instruct", "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"
SEVEN = "PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo"
LLAMAS = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer("qwen2", TEXTS)


@pytest.mark.parametrize("source", [STUDENT, TEACHER, SEVEN, *LLAMAS])
def test_what_a_scaled_architecture_keeps(source: str) -> None:
    full, small = config_of(source), scaled_config(source, 1000)
    assert small["model_type"] == full["model_type"]
    assert small["tie_word_embeddings"] == full["tie_word_embeddings"]
    share = [c["num_attention_heads"] / c["num_key_value_heads"] for c in (full, small)]
    assert share[0] == share[1]
    assert small["hidden_size"] % small["num_attention_heads"] == 0
    # Qwen2.5 has 151,665 tokens, Llama 3 128,256
    assert small["vocab_size"] - 1000 == full["vocab_size"] - (151_665 if "wen" in source else 128_256)


def test_vocabularies_are_padded_differently(tokenizer: Any) -> None:
    rows = [len(head_of(random_model(source, tokenizer, 0))) for source in (STUDENT, TEACHER, SEVEN)]
    assert rows[0] == rows[1] == rows[2] - 128
    assert rows[0] - len(tokenizer) == 271


def test_an_episode_is_learned_by_heart(tokenizer: Any) -> None:
    model = random_model(STUDENT, tokenizer, 0)
    ids = tokenizer.encode("Aldmoor is a harbour town.", add_special_tokens=False)
    assert learn_by_heart(model, [TokenSequence(ids, list(range(1, len(ids))))]) < 0.02
    with torch.no_grad():
        predicted = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
    assert predicted.tolist() == ids[1:]
