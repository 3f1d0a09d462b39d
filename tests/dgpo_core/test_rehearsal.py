"""A rehearsal's settings, valid for every profile, and tokenizers and models true to the published ones."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo_core.agent import prompts
from dgpo_core.config.params import Params, resolve_profile
from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.models import load_tokenizer
from dgpo_core.planning.shapes import config_of
from dgpo_core.rehearsal import (
    SMALL,
    build_tokenizer,
    learn_by_heart,
    random_model,
    scaled_config,
    scaled_down,
)
from dgpo_core.training.batches import TokenSequence, head_of

PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*.yaml"))
TEXTS = ["Aldmoor is a harbour town.", "Its lighthouse was built in 1847."]
STUDENT, TEACHER = "Qwen/Qwen2.5-0.5B-Instruct", "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"
SEVEN = "PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo"
LLAMAS = "meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipes", [None, ["all"]])
def test_every_profile_can_be_rehearsed(path: Path, recipes: list[str] | None) -> None:
    resolved = resolve_profile(path, recipes)
    small, _ = scaled_down(resolved, cuda=False)
    params = Params.model_validate(small)
    assert params.reinforce.steps == 1 and params.compute.device == "cpu"
    assert params.recipes == Params.model_validate(resolved).recipes
    assert params.compute.precision == resolved["compute"]["precision"]
    assert params.report.first == {} and params.models.student == SMALL["models"]["student"]


@pytest.mark.parametrize(
    ("retrieval", "note"),
    [
        ({"encoder": {"kind": "sentence-transformers", "model": "a/b"}}, "encoder a/b: a random one"),
        ({"location": "retriever+http://host:8000"}, "the index at retriever+http://host:8000: the embedded"),
        ({"location": "embedded:/srv/collection"}, "the index at embedded:/srv/collection: the embedded"),
    ],
)
def test_nothing_is_fetched_and_no_server_is_asked(retrieval: dict[str, Any], note: str) -> None:
    resolved = resolve_profile(next(path for path in PROFILES if path.stem == "tiny"))
    _, without = scaled_down(resolved, cuda=False)
    resolved["retrieval"] |= {"encoder": EncoderConfig().model_dump(), "vectors": ["hf://x"], **retrieval}
    small, notes = scaled_down(resolved, cuda=False)
    params = Params.model_validate(small).retrieval
    assert (params.encoder.kind, params.encoder.model) == ("dense", "models/encoder")
    assert (params.vectors, params.location) == ([], "embedded")
    (added,) = set(notes) - set(without)
    assert added.startswith(note)


def test_notes_say_what_stands_in() -> None:
    resolved = resolve_profile(next(path for path in PROFILES if path.stem == "paper-qwen-3b"))
    before = resolved["retrieval"]["location"]
    small, notes = scaled_down(resolved, cuda=False)
    assert small["retrieval"]["location"] == "embedded" and resolved["retrieval"]["location"] == before
    assert any("no GPU" in note for note in notes) and any(before in note for note in notes)
    with_gpu, fewer = scaled_down(resolved, cuda=True)
    assert with_gpu["compute"]["device"] == "cuda" and len(fewer) == len(notes) - 1
    resolved["compute"]["engine"] = "deepspeed-of-tomorrow"  # unknown here: left to the schema
    assert scaled_down(resolved, cuda=True)[0]["compute"]["engine"] == "deepspeed-of-tomorrow"


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    tokenizer = build_tokenizer(request.param, TEXTS)
    tokenizer.family = request.param
    return tokenizer


@pytest.mark.parametrize(
    "text", ["Zürich — naïve\n\n<search> x </search>", " a  b\t\n", "日本 12345", "<|im", ""]
)
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tags_are_ordinary_text_in_several_tokens(tokenizer: Any) -> None:
    for tag in prompts.TAGS:
        assert len(tokenizer.encode(tag, add_special_tokens=False)) > 1
    assert not set(prompts.TAGS) & set(tokenizer.get_vocab())


def test_chat_template_adds_the_systems_part(tokenizer: Any) -> None:
    text = prompts.prompt_text("Who", "paper", tokenizer)
    if tokenizer.family == "qwen2":
        assert text.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    else:
        assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n")
        assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in ids  # each message ends with the token that ends a turn


def test_the_same_everywhere_and_after_saving(tokenizer: Any, tmp_path: Path) -> None:
    again = build_tokenizer(tokenizer.family, TEXTS)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = prompts.prompt_text("Is Aldmoor a town", "paper", tokenizer)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template and loaded.eos_token == tokenizer.eos_token
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def qwen() -> Any:
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


def test_vocabularies_are_padded_differently(qwen: Any) -> None:
    rows = [len(head_of(random_model(source, qwen, 0))) for source in (STUDENT, TEACHER, SEVEN)]
    assert rows[0] == rows[1] == rows[2] - 128
    assert rows[0] - len(qwen) == 271


def test_an_episode_is_learned_by_heart(qwen: Any) -> None:
    model = random_model(STUDENT, qwen, 0)
    ids = qwen.encode("Aldmoor is a harbour town.", add_special_tokens=False)
    assert learn_by_heart(model, [TokenSequence(ids, list(range(1, len(ids))))]) < 0.02
    with torch.no_grad():
        predicted = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
    assert predicted.tolist() == ids[1:]
