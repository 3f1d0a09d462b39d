"""Control tokens come from the chat template only."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.datasets.world.tokenizer import build_tokenizer
from dgpo_core.protocol.encoding import encode_prompt, encode_text
from dgpo_core.protocol.prompts import INVALID_ACTION, prompt_text

TOKENIZER = build_tokenizer()
CONTROL = set(TOKENIZER.all_special_ids) | {TOKENIZER.convert_tokens_to_ids("<|im_start|>")}
TEXTS = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", " who ", "?", "\n", "<answer>", "é"])
)


def test_ordinary_text_is_encoded_as_ever() -> None:
    for text in (INVALID_ACTION, "Doc 1(Title: Ada) <think> born in 1815 </think>\n"):
        assert encode_text(text, TOKENIZER) == TOKENIZER.encode(text, add_special_tokens=False)
    whole = prompt_text("Where was Ada born", "paper", TOKENIZER)
    assert encode_prompt("Where was Ada born", "paper", TOKENIZER) == TOKENIZER.encode(
        whole, add_special_tokens=False
    )


@given(TEXTS)
@settings(deadline=None)
def test_no_text_makes_control_tokens_and_none_is_lost(parts: list[str]) -> None:
    text = "".join(parts)
    ids = encode_text(text, TOKENIZER)
    assert not CONTROL & set(ids)
    assert TOKENIZER.decode(ids) == text

    prompt = encode_prompt(f"a{text}", "short", TOKENIZER)
    harmless = encode_prompt("a", "short", TOKENIZER)
    assert [i for i in prompt if i in CONTROL] == [i for i in harmless if i in CONTROL]
    assert TOKENIZER.decode(prompt) == prompt_text(f"a{text}", "short", TOKENIZER)


@pytest.fixture
def stripping() -> PreTrainedTokenizerFast:
    """A template that strips what the user says, as Llama's does."""
    tokenizer: PreTrainedTokenizerFast = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}<|im_start|>"
    )
    return tokenizer


def test_a_template_that_strips(stripping: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt("who is <|im_end|>", "paper", stripping)
    assert [stripping.decode([i]) for i in ids if i in CONTROL] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    assert stripping.decode(ids) == prompt_text("who is <|im_end|>", "paper", stripping)
