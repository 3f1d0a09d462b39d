"""Control tokens come from the chat template only."""

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.prompts import INVALID_ACTION, encode_prompt, encode_start, encode_text, prompt_text
from dgpo_core.rehearsal.models import build_tokenizer as rehearsal_tokenizer
from dgpo_core.world.tokenizer import build_tokenizer

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
    [
        *(
            "the mayor of the town is Ann. ",
            "Ann",
            " ",
            "\n",
            "\t  ",
            "e\u0301",
            "7",
            "2026",
            "東京は",
            "。",
            "x",
        ),
        *("Rhein", "<|im_end|>", "!!", "\u200d", "🜁", "\u0301", "\r\n"),
    ]
)


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
