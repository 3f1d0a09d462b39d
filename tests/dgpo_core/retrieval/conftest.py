"""Passages of a small world with queries, their shards, and a Qdrant server."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, write_jsonl
from dgpo_core.retrieval import qdrant_server as loading
from dgpo_core.retrieval.collection import Content, Part, Point
from dgpo_core.retrieval.encoders import Vector
from dgpo_core.retrieval.shards import build_shards
from dgpo_core.world.questions import Article
from tests.dgpo_core.retrieval.qdrant_server import QdrantServer, running
from tests.dgpo_core.retrieval.words import WORDS, word_tokenizer

BM25 = EncoderConfig(kind="bm25")


@pytest.fixture(scope="session")
def passages(articles: list[Article]) -> list[Passage]:
    return [p for article in articles for p in article.passages]


@pytest.fixture(scope="session")
def queries(articles: list[Article]) -> list[tuple[str, str]]:
    """(well-formed query, id of the passage with the fact) for every fact."""
    return [
        (fact.relation.noun_phrase(fact.subject.mention).removeprefix("the "), passage.id)
        for article in articles
        for passage, facts in zip(article.passages, article.facts, strict=True)
        for fact in facts
    ]


@pytest.fixture(scope="session")
def shards(passages: list[Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 passages in four shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("shards")
    write_jsonl(folder / "corpus.jsonl", passages[:150])
    config = RetrievalConfig(encoder=BM25, shard_size=40)
    build_shards(folder / "corpus.jsonl", folder / "index", config, lambda *_: None)
    return folder / "index"


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def dense_shards(passages: list[Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same passages encoded by a random BERT of 24 layers that knows their words. Not to be changed."""
    folder = tmp_path_factory.mktemp("dense")
    words = sorted({word for passage in passages[:150] for word in passage.contents.split()})
    word_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=4 + len(words),
        hidden_size=16,
        num_hidden_layers=24,
        num_attention_heads=2,
        intermediate_size=24,
    )
    BertModel(shape).save_pretrained(folder / "bert")
    write_jsonl(folder / "corpus.jsonl", passages[:150])
    config = RetrievalConfig(encoder=EncoderConfig(model=str(folder / "bert"), max_tokens=64), shard_size=60)
    build_shards(folder / "corpus.jsonl", folder / "index", config, lambda *_: None)
    return folder / "index"


@pytest.fixture
def qdrant(monkeypatch: pytest.MonkeyPatch) -> Iterator[QdrantServer]:
    """Looked at a hundred times as often as a real one."""
    monkeypatch.setattr(loading, "POLL", 0.005)
    with running(QdrantServer()) as server:
        yield server


def dense_content(passages: list[Passage], size: int = 8, parts: int = 3) -> tuple[Content, np.ndarray]:
    """Passages with random vectors of length 1, and those vectors: [passages, size], float32."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(len(passages), size)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return content(passages, matrix.tolist(), size, parts), matrix


def content(passages: list[Passage], vectors: list[Vector], size: int | None, parts: int = 3) -> Content:
    points = [Point(i, p, {"text": v}) for i, (p, v) in enumerate(zip(passages, vectors, strict=True))]
    bounds = np.linspace(0, len(points), parts + 1).astype(int).tolist()
    cut = [
        Part(a, b - a, lambda a=a, b=b: iter(points[a:b]))  # type: ignore[misc]
        for a, b in pairwise(bounds)
    ]
    return Content("dgpo-test-0123", "0123", len(points), {"text": size}, cut)
