"""The rehearsal's tokenizers, against what is known of Qwen2.5's and Llama 3's."""

from pathlib import Path
from typing import Any

import pytest

from dgpo_core.agent import prompts
from dgpo_core.models import load_tokenizer
from dgpo_core.rehearsal.models import build_tokenizer

TEXTS = ["Aldmoor is a harbour town.", "Its lighthouse was built in 1847."]


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
