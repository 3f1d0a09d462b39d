"""Encoders: the dense one against pooling written out by hand, on a real (random) BERT."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import UserError
from dgpo_core.retrieval.encoders import Bm25Encoder, DenseEncoder, SparseVector, make_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", ":", "red", "green", "blue", "house", "tree"]


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word; the first four are BERT's special ones."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT and a tokenizer, as a hub model has."""
    folder = tmp_path_factory.mktemp("bert")
    word_tokenizer(WORDS).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


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
    encoder = DenseEncoder(EncoderConfig(model=str(bert), batch_size=batch_size))
    texts = ["red house", "green green tree house blue red", "blue"]
    for prefix, vectors in (
        ("query: ", encoder.encode_queries(texts)),
        ("passage: ", encoder.encode_passages(texts)),
    ):
        assert encoder.size == len(vectors[0]) == 16  # type: ignore[arg-type]
        for text, vector in zip(texts, vectors, strict=True):
            np.testing.assert_allclose(np.array(vector), pooled(bert, prefix + text), atol=1e-5)
    assert encoder.encode_queries([]) == []


def test_dense_encoder_cuts_long_texts(bert: Path) -> None:
    encoder = DenseEncoder(EncoderConfig(model=str(bert), max_tokens=6, query_prefix=""))
    (vector,) = encoder.encode_queries(["red green blue house tree tree"])
    np.testing.assert_allclose(np.array(vector), pooled(bert, "red green blue house tree tree", 6), atol=1e-5)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"retrieval\.encoder\.model: cannot load"):
        DenseEncoder(EncoderConfig(model=str(tmp_path)))


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


def test_make_encoder(bert: Path) -> None:
    assert isinstance(make_encoder(EncoderConfig(kind="bm25"), 10.0), Bm25Encoder)
    assert isinstance(make_encoder(EncoderConfig(kind="dense", model=str(bert)), 10.0), DenseEncoder)
