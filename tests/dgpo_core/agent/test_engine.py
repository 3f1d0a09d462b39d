"""When a generation ends, on tokens of one byte and on tokens in which a stop string ends."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dgpo_core.agent.engine import FinishReason, StopCriteria, eos_ids

STOP = ("</search>", "</answer>")
PIECES = ["a", ">", "<", "</", "search", "answer", ">\n", "h>", ">>", "</search", "</search>", "é", "\n"]


def piecewise_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, and some pieces of more bytes, each a token."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = ["".join(part for part, _ in to_bytes.pre_tokenize_str(piece)) for piece in PIECES]
    vocabulary = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *pieces])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="a"))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


TOKENIZER = piecewise_tokenizer()
EOS = TOKENIZER.eos_token_id
CRITERIA = StopCriteria(TOKENIZER, {EOS}, len(TOKENIZER) + 5)
ID = {TOKENIZER.decode([i]): i for i in range(len(TOKENIZER))}


@pytest.mark.parametrize(
    ("pieces", "count", "finish"),
    [
        (["a", "</search>", "a"], 2, FinishReason.STOP),
        (["</", "search", ">\n", "a"], 3, FinishReason.STOP),  # ends inside a token, which stays whole
        (["</search", ">>", "a"], 2, FinishReason.STOP),
        (["</", "answer", "a", ">"], 4, None),
        (["a", "<|im_end|>", "a"], 2, FinishReason.EOS),
        (["a"] * 9, 6, FinishReason.LENGTH),
        (["a"] * 4 + ["</search", ">"], 6, FinishReason.STOP),  # at the limit
    ],
)
def test_endings(pieces: list[str], count: int, finish: FinishReason | None) -> None:
    ids = [ID[piece] for piece in pieces]
    assert CRITERIA.first_finish(ids, 6, STOP) == (count, finish)


def test_ids_without_a_token_are_those_behind_the_last_one() -> None:
    """Whatever holes are before it, and however few rows the head has."""
    known = len(TOKENIZER)
    assert (CRITERIA.known, list(CRITERIA.unknown)) == (known, list(range(known, known + 5)))
    fewer = StopCriteria(TOKENIZER, {EOS}, known - 2)
    assert (fewer.known, list(fewer.unknown)) == (known - 2, [])
    with_holes = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 9, "c": 4})
    assert list(StopCriteria(with_holes, {0}, 12).unknown) == [10, 11]


@given(st.lists(st.sampled_from(range(len(TOKENIZER))), min_size=1, max_size=40))
def test_first_ending_is_the_first_prefix_that_has_one(ids: list[int]) -> None:
    def ended(count: int) -> bool:
        text = TOKENIZER.decode(ids[:count])
        return EOS in ids[:count] or any(stop in text for stop in STOP) or count >= 30

    count, finish = CRITERIA.first_finish(ids, 30, STOP)
    assert [ended(n) for n in range(1, count + 1)] == [False] * (count - 1) + [finish is not None]


def test_ids_without_text_end_nothing() -> None:
    assert CRITERIA.finish([len(TOKENIZER) + 4], 3, STOP) is None


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (None, {EOS}),
        (SimpleNamespace(eos_token_id=7), {7, EOS}),
        (SimpleNamespace(eos_token_id=[3, 4]), {3, 4, EOS}),
    ],
)
def test_end_tokens(settings: object, found: set[int]) -> None:
    assert eos_ids(TOKENIZER, settings) == found
