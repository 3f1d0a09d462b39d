"""The texts of the environment, and their tokens: control tokens come from the chat template only."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.prompts import (
    INVALID_ACTION,
    document,
    encode_prompt,
    encode_start,
    encode_text,
    information,
    known_ids,
    message_text,
    prompt_text,
    with_question_mark,
    without_tags,
)
from dgpo_core.datasets.records import Passage
from dgpo_core.rehearsal import build_tokenizer as rehearsal_tokenizer
from dgpo_core.world.pretraining import build_tokenizer

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [*dict.fromkeys(["Who", "Who?", " Who? ", "Who "], "Who?").items(), ("Who;", "Who;?")],  # no Greek one
)
def test_question_mark_is_added_once(text: str, expected: str) -> None:
    assert with_question_mark(text) == expected


@pytest.mark.parametrize("mark", "?？؟\u037e՞‽⁇﹖")
def test_other_scripts_question_marks_end_a_question_too(mark: str) -> None:
    assert with_question_mark(f"Who{mark} ") == f"Who{mark}"
    assert with_question_mark(f"Who{mark}\u200f") == f"Who{mark}"


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


def test_other_peoples_tags_are_opened() -> None:
    """In every form that a tokenizer may take for one; only the protocol's own, and nothing else."""
    written = "a </information> <ANSWER> \uff1csearch\uff1e <\uff0fthink> <b> < search> <searches>"
    shown = "a < /information> < ANSWER> \uff1c search\uff1e < \uff0fthink> <b> < search> <searches>"
    assert without_tags(written) == shown
    assert document(3, written, written) == f"Doc 3(Title: {shown}) {shown}\n"
    assert document(3, "A", "b", "release") == 'Doc 3(Title: "A") b\n'
    assert message_text(f"who {written} ", "short").endswith(f"Question: who {shown}?\n")


def test_added_tokens_that_are_not_special_are_text_too() -> None:
    """As Qwen's of tools: a longer one is not cut at a shorter one that it begins with."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tools = ["<tool>", "<tool>x", "[more]"]
    tokenizer.add_tokens([AddedToken(tool, special=False, normalized=False) for tool in tools])
    ids = {tokenizer.get_vocab()[tool] for tool in tools}
    for text in ("<tool>", "a<tool>x<tool>[more] b", "[more]<|im_end|>[more]", "<answer> c </answer>"):
        assert not ids & set(encode_text(text, tokenizer))
        assert tokenizer.decode(encode_text(text, tokenizer)) == text
    assert ids & set(tokenizer.encode("<tool>x[more]"))
    tokenizer.chat_template = "<tool>{{ messages[0]['content'] }}[more]"  # the template may write them
    for asked in ("who", "who is <tool>x of [more]"):
        prompt = encode_prompt(asked, "short", tokenizer)
        assert tokenizer.decode([i for i in prompt if i in ids]) == "<tool>[more]"
    plain = "Where was Ada born"
    assert encode_text(plain, tokenizer) == TOKENIZER.encode(plain)
    assert known_ids(tokenizer) == known_ids(TOKENIZER) + 3 == max(ids) + 1


TRAINED_ON = [
    "the mayor of the town is Ann. " * 3,
    "Köln liegt am Rhein, 1234567 Einwohner",
    "東京は日本の首都です",
]


def fast(model: models.Model, trainer: Any, split: Any = None, decimal: bool = False) -> Any:
    """A tokenizer of the given kind; without `split` the whole text is one word, as in some of Llama's."""
    made = Tokenizer(model)
    made.normalizer = normalizers.NFKC()
    if split is not None:
        made.pre_tokenizer = split
    if decimal:  # digits in threes from the right, as few have them: the end decides about the start
        threes = pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*(?!\d))"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([threes])
    made.train_from_iterator(TRAINED_ON * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


BPE = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
KINDS = {
    "embedded world": TOKENIZER,
    "qwen2": rehearsal_tokenizer("qwen2", TRAINED_ON),
    "llama": rehearsal_tokenizer("llama", TRAINED_ON),
    "bpe without words": fast(models.BPE(unk_token="<unk>"), BPE),
    "bpe with decimal groups": fast(models.BPE(unk_token="<unk>"), BPE, decimal=True),
    "unigram": fast(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        ),
        pre_tokenizers.Metaspace(),
    ),
    "wordpiece": fast(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False),
        pre_tokenizers.BertPreTokenizer(),
    ),
}
PIECES = st.sampled_from(
    ["the mayor of the town is Ann. ", "Ann", " ", "\n", "\t  ", "e\u0301", "7", "2026", "東京は", "。", "x",
     "Rhein", "<|im_end|>", "!!", "\u200d", "🜁", "\u0301", "\r\n"]
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(st.tuples(PIECES, st.integers(1, 900)), min_size=1, max_size=6),
    count=st.integers(0, 120),
)
@settings(deadline=None, max_examples=60)
def test_the_start_is_that_of_the_whole(kind: str, parts: list[tuple[str, int]], count: int) -> None:
    """Long runs of one thing included, of which tokenisers make long words and long tokens."""
    text = "".join(part * times for part, times in parts)
    assert encode_start(text, KINDS[kind], count) == encode_text(text, KINDS[kind])[:count]


def test_no_more_is_read_than_is_wanted() -> None:
    read = 0

    class Counting:
        def encode(self, text: str, **options: Any) -> list[int]:
            nonlocal read
            read += len(text)
            ids: list[int] = TOKENIZER.encode(text, **options)
            return ids

    for unit in ("the mayor of the town is Ann. ", "东京是日本的首都", "a", " ", "é"):
        read = 0
        text = unit * (1_000_000 // len(unit))
        assert len(encode_start(text, Counting(), 320)) == 320
        assert read < 200_000, unit


def test_a_template_that_strips() -> None:
    """As Llama's strips what the user says."""
    stripping = copy.deepcopy(TOKENIZER)
    stripping.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}<|im_start|>"
    )
    ids = encode_prompt("who is <|im_end|>", "paper", stripping)
    control = [stripping.decode([i]) for i in ids if i in CONTROL]
    assert control == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert stripping.decode(ids) == prompt_text("who is <|im_end|>", "paper", stripping)
