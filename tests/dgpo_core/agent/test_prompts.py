"""The text that opens an episode."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.prompts import document, information, prompt_text, with_question_mark
from dgpo_core.datasets.records import Passage

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


@pytest.mark.parametrize("mark", "?？؟\u037e՞‽⁇﹖")
def test_other_scripts_question_marks_end_a_question_too(mark: str) -> None:
    assert with_question_mark(f"Who{mark} ") == f"Who{mark}"
    assert with_question_mark(f"Who{mark}\u200f") == f"Who{mark}"


def test_a_semicolon_is_no_question_mark() -> None:
    """Greek writes one that looks like it."""
    assert with_question_mark("Who;") == "Who;?"


def test_document() -> None:
    assert document(2, "T", "text") == "Doc 2(Title: T) text\n"
    assert document(2, "T", "text", "release") == 'Doc 2(Title: "T") text\n'


def search_r1(contents: list[str]) -> str:
    """What its environment appends: `_passages2string` and `execute_predictions`, word for word."""
    format_reference = ""
    for idx, content in enumerate(contents):
        title = content.split("\n")[0]
        text = "\n".join(content.split("\n")[1:])
        format_reference += f"Doc {idx + 1}(Title: {title}) {text}\n"
    return f"\n\n<information>{format_reference.strip()}</information>\n\n"


TEXT = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=3))
def test_information_as_the_release_shows_it(rows: list[tuple[str, str, str]]) -> None:
    passages = [Passage("1", title, f"{line}\n{other}") for title, line, other in rows]
    shown = information([(passage.title, passage.text) for passage in passages], "release")
    assert shown == search_r1([passage.contents for passage in passages])


def test_information_by_hand() -> None:
    passages = [("Red (band)", "a"), ("B", "b")]
    assert information(passages, "release") == (
        '\n\n<information>Doc 1(Title: "Red (band)") a\nDoc 2(Title: "B") b</information>\n\n'
    )
    assert information(passages) == (
        "\n\n<information>Doc 1(Title: Red (band)) a\nDoc 2(Title: B) b\n</information>\n\n"
    )
