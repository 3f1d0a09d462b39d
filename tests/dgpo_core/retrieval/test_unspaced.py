"""Scripts without spaces: their words are found, and every other text keeps its tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.datasets.records import Passage
from dgpo_core.retrieval.encoders import Bm25Encoder, SparseVector
from dgpo_core.retrieval.index import index_passages
from dgpo_core.text import spaced
from tests.dgpo_core.retrieval.conftest import BM25

TEXTS = {
    "zh": "茶馆的老板住在河边的旧房子里。1930年代的Paris",
    "zh2": "老虎住在山上",
    "ja": "図書館は駅の近くにあります。カフェは休みです",
    "th": "ร้านหนังสืออยู่ใกล้สถานีรถไฟ",
    "lo": "ຮ້ານປຶ້ມຢູ່ໃກ້ສະຖານີລົດໄຟ",
    "km": "ហាងសៀវភៅនៅជិតស្ថានីយ៍រថភ្លើង",
    "my": "စာအုပ်ဆိုင်သည်ဘူတာရုံအနီးတွင်ရှိသည်",
    "ko": "도서관은 역에서 가깝다",
    "en": "The library is near the station.",
}


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("老板", "zh"), ("旧房子", "zh"), ("paris", "zh"), ("1930", "zh"), ("山", "zh2"),
        ("図書館", "ja"), ("駅", "ja"), ("カフェ", "ja"), ("カフェはどこ", "ja"),
        ("สถานี", "th"), ("ร้านหนังสือ", "th"), ("ສະຖານີ", "lo"), ("ស្ថានីយ៍", "km"), ("ဘူတာ", "my"),
        ("도서관", "ko"), ("역", "ko"), ("\u1103\u1169\u1109\u1165", "ko"),
        ("libraries", "en"),
    ],
)  # fmt: skip
def test_a_word_finds_its_passage(query: str, found: str) -> None:
    index = index_passages([Passage(name, name, text) for name, text in TEXTS.items()], BM25)
    (hits,) = index.search([query], 3)
    assert hits[0].passage.id == found


@given(st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0x0DFF)))
def test_other_texts_are_left_as_they_are(text: str) -> None:
    """Latin, Greek, Cyrillic, Hebrew, Arabic, the scripts of India: the same text, so the same tokens."""
    assert spaced(text) == text


@given(
    st.lists(
        st.sampled_from(["the libraries ", "Ann's ", "老板", "駅", "ก่อน", "é", "\u0301", "、"]), max_size=8
    )
)
def test_words_beside_such_runs_are_the_same(parts: list[str]) -> None:
    encoder = Bm25Encoder(10.0)

    def terms(text: str) -> set[int]:
        (vector,) = encoder.encode_queries([text])
        assert isinstance(vector, SparseVector)
        return set(vector.indices)

    text = "".join(parts)
    assert terms("libraries Ann's") <= terms(f"the libraries of Ann's {text}")
    for part in parts:
        assert terms(part) <= terms(" ".join(parts))
