"""The text that opens an episode."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from dgpo_core.protocol.prompts import document, prompt_text, with_question_mark

PAPER = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you "
    "get new information. After reasoning, if you find you lack some knowledge, you can call a search engine "
    "by <search> query </search> and it will return the top searched results between <information> and "
    "</information>. You can search as many times as your want. If you find no further external knowledge "
    "needed, you can directly provide the answer inside <answer> and </answer>, without detailed "
    "illustrations. For example, <answer> Beijing </answer>. Question: who wrote {x}?\n"
)


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer without a chat template."""
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.chat_template is None
    return loaded


def test_model_without_chat_template_gets_the_instruction(plain: PreTrainedTokenizerFast) -> None:
    assert prompt_text("who wrote {x}", "paper", plain) == PAPER


def test_chat_template_wraps_one_user_message(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text("who wrote {x}", "paper", tokenizer) == (
        f"<|im_start|>user\n{PAPER}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_that_tell_the_date_tell_always_the_same(plain: PreTrainedTokenizerFast) -> None:
    """As Llama 3.2's does."""
    plain.chat_template = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
        "{% endif %}{% endif %}Today Date: {{ date_string }}\n{{ messages[0]['content'] | trim }}"
    )
    assert prompt_text("who wrote {x}", "paper", plain) == f"Today Date: 26 Jul 2024\n{PAPER.strip()}"


@pytest.mark.parametrize("text", ["Who", "Who?", " Who? ", "Who "])
def test_question_mark_is_added_once(text: str) -> None:
    assert with_question_mark(text) == "Who?"


def test_document() -> None:
    assert document(2, "T", "text") == "Doc 2(Title: T) text\n"
