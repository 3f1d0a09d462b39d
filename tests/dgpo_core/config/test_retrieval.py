"""Locations of an index: what they mean, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dgpo_core.config.retrieval import EncoderConfig, QdrantConfig, RetrievalConfig, parse_location
from dgpo_core.errors import UserError
from tests.dgpo_core.config.test_params import loaded


@pytest.mark.parametrize(
    ("text", "kind", "place"),
    [
        ("memory", "memory", ""),
        ("embedded", "embedded", ""),
        ("embedded:data/qdrant", "folder", "data/qdrant"),
        ("http://qdrant:6333", "server", "http://qdrant:6333"),
        ("https://cluster.example/prefix/", "server", "https://cluster.example/prefix"),
        ("retriever+http://127.0.0.1:8000", "service", "http://127.0.0.1:8000"),
        ("retriever+https://search.example/", "service", "https://search.example"),
    ],
)
def test_locations(text: str, kind: str, place: str) -> None:
    assert parse_location(text) == (kind, place)
    assert RetrievalConfig(location=text).location == text


@pytest.mark.parametrize(
    "text",
    " embedded: disk qdrant:6333 ftp://a http:// retriever+memory http://a:6333?x=1 http://a#b".split(" "),
)
def test_what_is_no_location_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match='location: must be "embedded", "embedded:<folder>"'):
        RetrievalConfig(location=text)


@pytest.mark.parametrize(
    "text",
    [
        "http://me:" + "sesame@qdrant:6333",
        "https://sesame@qdrant",
        "retriever+http://a:" + "sesame@b",
        "http://qdrant?api_key=sesame",
        "http://qdrant?Token=sesame",
    ],
)
def test_credentials_are_refused_and_not_repeated(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no credentials in the URL.* QDRANT_API_KEY") as refused:
        loaded(tmp_path, {"retrieval": {"location": text}})
    assert "sesame" not in str(refused.value)


@given(st.text())
def test_any_text_is_a_location_or_refused(text: str) -> None:
    try:
        kind, place = parse_location(text)
    except ValueError:
        return
    assert kind in ("memory", "embedded") or place


def test_hybrid_needs_a_dense_encoder() -> None:
    assert RetrievalConfig(hybrid=True).hybrid
    with pytest.raises(ValidationError, match=r"hybrid: adds BM25 to a dense encoder"):
        RetrievalConfig(hybrid=True, encoder=EncoderConfig(kind="bm25"))


def test_what_a_collection_is_built_with() -> None:
    names = ["shards", "replicas", "quantization", "hnsw_m", "hnsw_ef_construct"]
    assert list(QdrantConfig().built()) == names
