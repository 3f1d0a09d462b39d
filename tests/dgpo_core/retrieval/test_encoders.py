"""Encoders against the libraries that they stand for, and BM25 in every script."""

import sys
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pytest
import qdrant_edge
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertModel

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.datasets.records import Passage
from dgpo_core.errors import UserError
from dgpo_core.retrieval import dense_encoders
from dgpo_core.retrieval.dense_encoders import BUFFER, MeanPoolingEncoder, SentenceTransformersEncoder
from dgpo_core.retrieval.encoders import Bm25Encoder, SparseVector
from dgpo_core.retrieval.index import index_passages
from dgpo_core.retrieval.shards import make_encoder
from dgpo_core.text import start_of
from tests.dgpo_core.retrieval.conftest import BM25
from tests.dgpo_core.retrieval.words import WORDS


def close(vectors: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(vectors), expected, atol=1e-5)


def pooled(folder: Path, text: str, max_tokens: int = 256) -> np.ndarray:
    """Mean over the tokens of a text that stands alone, so nothing is padded."""
    ids = [2] + [WORDS.index(w) if w in WORDS else 1 for w in text.replace(":", " :").split()] + [3]
    if len(ids) > max_tokens:
        ids = [*ids[: max_tokens - 1], 3]
    with torch.no_grad():
        hidden = BertModel.from_pretrained(folder).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    mean = hidden.mean(0).numpy()
    return np.asarray(mean / np.sqrt((mean**2).sum()))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_dense_vectors_are_normalised_means(bert: Path, batch_size: int) -> None:
    encoder = MeanPoolingEncoder(EncoderConfig(model=str(bert), batch_size=batch_size))
    texts = ["red house", "green green tree house blue red", "blue"]
    for prefix, vectors in (
        ("query: ", encoder.encode_queries(texts)),
        ("passage: ", encoder.encode_passages(texts)),
    ):
        assert encoder.size == len(vectors[0]) == 16  # type: ignore[arg-type]
        for text, vector in zip(texts, vectors, strict=True):
            close(vector, pooled(bert, prefix + text))
    assert encoder.encode_queries([]) == []


def test_dense_encoder_cuts_long_texts(bert: Path) -> None:
    encoder = MeanPoolingEncoder(EncoderConfig(model=str(bert), max_tokens=6, query_prefix=""))
    (vector,) = encoder.encode_queries(["red green blue house tree tree"])
    close(vector, pooled(bert, "red green blue house tree tree", 6))


def test_of_a_long_text_the_start_alone_is_read(
    bert: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same vectors as of the whole, which takes seconds to tokenise."""
    text = "red house green tree " * 20_000
    read: list[int] = []

    def measured(text: str, encode: Any, count: int) -> str:
        read.append(len(start_of(text, encode, count)))
        return text

    for config in (
        EncoderConfig(model=str(bert), max_tokens=20, passage_prefix=""),
        EncoderConfig(kind="sentence-transformers", model=str(minilm), max_tokens=20),
    ):
        encoder = make_encoder(config, 10.0)
        whole, start = (np.array(encoder.encode_passages([t])) for t in (text, text[:400]))
        np.testing.assert_allclose(whole, start, atol=1e-5)
        with monkeypatch.context() as patch:
            patch.setattr(dense_encoders, "start_of", measured)
            encoder.encode_passages([text])
        assert read.pop() < 2000


def test_vectors_that_are_no_numbers_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MeanPoolingEncoder(EncoderConfig(model=str(bert)))
    weights = encoder._model.embeddings.word_embeddings.weight
    with torch.no_grad():
        weights.fill_(float("nan"))
    with pytest.raises(UserError, match=r"makes vectors that are not numbers.*retrieval\.precision"):
        encoder.encode_passages(["red house"])


@pytest.mark.parametrize("kind", ["dense", "sentence-transformers"])
def test_folder_without_a_model(tmp_path: Path, kind: Literal["dense", "sentence-transformers"]) -> None:
    with pytest.raises(UserError, match=r"retrieval\.encoder\.model: cannot load"):
        make_encoder(EncoderConfig(kind=kind, model=str(tmp_path)), 10.0)


def test_bm25_weights() -> None:
    """tf (k + 1) / (tf + k (1 - b + b length / average)), k = 1.2, b = 0.75, on stemmed words."""
    encoder = Bm25Encoder(average_words=4.0)
    (vector,) = encoder.encode_passages(["houses tree house"])
    (query,) = encoder.encode_queries(["house"])
    assert isinstance(vector, SparseVector)
    assert isinstance(query, SparseVector)
    weights = dict(zip(vector.indices, vector.values, strict=True))
    norm = 1.2 * (1 - 0.75 + 0.75 * 3 / 4)
    assert weights.pop(query.indices[0]) == pytest.approx(2 * 2.2 / (2 + norm), rel=1e-5)
    assert list(weights.values()) == pytest.approx([2.2 / (1 + norm)], rel=1e-5)


@pytest.mark.parametrize(
    ("language", "asked", "written"),
    [("german", "Haus", "Häuser"), ("french", "cheval", "chevaux"), ("english", "house", "houses")],
)
def test_bm25_knows_the_words_of_its_language(language: Any, asked: str, written: str) -> None:
    encoder = make_encoder(EncoderConfig(kind="bm25", language=language), 4.0)
    (query,), (passage,) = encoder.encode_queries([asked]), encoder.encode_passages([written])
    assert isinstance(query, SparseVector) and isinstance(passage, SparseVector)
    assert query.indices == passage.indices
    other = make_encoder(EncoderConfig(kind="bm25", language="turkish"), 4.0)
    assert other.encode_queries([asked]) != other.encode_queries([written])


def test_languages_are_those_of_qdrant() -> None:
    ours = set(get_args(EncoderConfig.model_fields["language"].annotation))
    assert ours == {name.lower() for name in dir(qdrant_edge.Language) if name[0] != "_"}
    for language in ours:
        Bm25Encoder(4.0, language)


def test_english_is_recorded_as_it_was_before_languages() -> None:
    """So an index that exists, and the embedded world's, keeps its digest."""
    assert "language" not in EncoderConfig(kind="bm25").recorded()
    recorded = EncoderConfig(kind="bm25", language="german").recorded()
    assert EncoderConfig.model_validate(recorded).language == "german"


def test_dense_encoders_read_composed_letters(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, read = MeanPoolingEncoder(EncoderConfig(model=str(bert))), list[str]()

    def encoded(texts: list[str], query: bool, on_encoded: Any) -> np.ndarray:
        read.extend(texts)
        return np.zeros((len(texts), encoder.size), np.float32)

    monkeypatch.setattr(encoder, "_encode", encoded)
    encoder.encode_queries(["Jose\u0301"])
    encoder.encode_passages(["Jose\u0301"])
    assert read == ["query: Jos\u00e9", "passage: Jos\u00e9"]


@pytest.mark.parametrize("text", ["Jose\u0301 Ibáñez", "José\u200b Ib\u00adáñez", "\u200fJosé Ibáñez"])
def test_bm25_finds_a_word_in_every_spelling(text: str) -> None:
    encoder = Bm25Encoder(average_words=4.0)
    assert encoder.encode_passages([text]) == encoder.encode_passages(["José Ibáñez"])
    assert encoder.encode_queries([text]) == encoder.encode_queries(["José Ibáñez"])
    assert encoder.passage_column([text], lambda count: None) == encoder.passage_column(
        ["José Ibáñez"], lambda count: None
    )


TEXTS = [
    "Marrowick is a harbour town on the northern coast.",
    "salmon",
    " ".join(["The River Osk rises in the Hallen Hills and reaches the sea at Marrowick."] * 30),
    "Who built the lighthouse of Marrowick?",
]


def test_a_real_model_gives_what_sentence_transformers_gives(minilm: Path) -> None:
    """Our pooling, cutting and sorting against the library; the model pools and normalises as E5 does."""
    oracle = SentenceTransformer(str(minilm), device="cpu")
    assert oracle.max_seq_length == 256
    expected = oracle.encode(TEXTS, show_progress_bar=False)
    for batch_size in (1, 3):
        plain = EncoderConfig(model=str(minilm), query_prefix="", passage_prefix="", batch_size=batch_size)
        close(MeanPoolingEncoder(plain).encode_passages(TEXTS), expected)
    config = EncoderConfig(kind="sentence-transformers", model=str(minilm), batch_size=2)
    encoder = make_encoder(config, 10.0)
    assert isinstance(encoder, SentenceTransformersEncoder)
    assert encoder.size == 384
    close(encoder.encode_passages(TEXTS), expected)
    close(encoder.encode_queries(TEXTS), expected)
    short = make_encoder(config.model_copy(update={"max_tokens": 12}), 10.0)
    oracle.max_seq_length = 12
    close(short.encode_passages(TEXTS), oracle.encode(TEXTS))


def test_prompts_and_prefixes_of_sentence_transformers(bert: Path, tmp_path: Path) -> None:
    """A model without normalisation that has prompts: both are heeded, and prefixes come after the prompt."""
    modules = [Transformer(str(bert)), Pooling(16)]
    SentenceTransformer(modules=modules, prompts={"query": "query: "}, device="cpu").save(str(tmp_path))
    config = EncoderConfig(kind="sentence-transformers", model=str(tmp_path), passage_prefix="passage: ")
    assert config.query_prefix == ""
    encoder = SentenceTransformersEncoder(config)
    for vectors, prefix in ((encoder.encode_queries, "query: "), (encoder.encode_passages, "passage: ")):
        (vector,) = vectors(["red house"])
        close(vector, pooled(bert, prefix + "red house"))


def test_columns_are_in_half_precision_and_progress_is_told(bert: Path) -> None:
    encoder = MeanPoolingEncoder(EncoderConfig(model=str(bert), batch_size=1))
    texts = ["red house " * (i % 5 + 1) for i in range(BUFFER + 3)]  # more than one buffer
    told: list[int] = []
    column = encoder.passage_column(texts, told.append)
    assert column.type == pa.list_(pa.float16(), 16)
    assert sum(told) == len(column) == len(texts)
    values = column.flatten().to_numpy().reshape(-1, 16).astype(np.float32)
    np.testing.assert_allclose(values, np.array(encoder.encode_passages(texts)), atol=1e-3)


def test_texts_of_similar_length_share_a_batch(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short and long texts in turn: sorted, hardly any token that is computed is padding."""
    encoder = MeanPoolingEncoder(EncoderConfig(model=str(bert), batch_size=8))
    computed = real = 0
    tokenize = encoder._tokenize

    def counted(texts: list[str]) -> Any:
        nonlocal computed, real
        inputs = tokenize(texts)
        computed += inputs["attention_mask"].numel()
        real += int(inputs["attention_mask"].sum())
        return inputs

    monkeypatch.setattr(encoder, "_tokenize", counted)
    encoder.encode_passages(["red house " * (1 + i % 2 * 30) for i in range(64)])
    assert computed == real


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_close(bert: Path, precision: str) -> None:
    config = EncoderConfig(model=str(bert))
    texts = ["red house", "green green tree house blue red"]
    exact, rounded = (
        MeanPoolingEncoder(config, "cpu", p).encode_passages(texts) for p in ("float32", precision)
    )
    np.testing.assert_allclose(np.array(rounded), np.array(exact), atol=0.05)
    assert rounded != exact


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, minilm: Path) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        UserError, match=r"sentence-transformers is not installed; pip install .*\[encoders\]"
    ):
        make_encoder(EncoderConfig(kind="sentence-transformers", model=str(minilm)), 10.0)


SCRIPTS = {
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
    index = index_passages([Passage(name, name, text) for name, text in SCRIPTS.items()], BM25)
    (hits,) = index.search([query], 3)
    assert hits[0].passage.id == found


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
