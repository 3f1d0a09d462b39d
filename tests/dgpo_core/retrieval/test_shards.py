"""Shards on disk: round trip, resuming, manifests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, write_jsonl
from dgpo_core.errors import UserError
from dgpo_core.retrieval import shards
from dgpo_core.retrieval.encoders import Bm25Encoder, SparseVector, Vector
from dgpo_core.retrieval.shards import build_shards, read_manifest, read_shard

CONFIG = RetrievalConfig(encoder=EncoderConfig(kind="bm25"), shard_size=4)
PASSAGES = [Passage(f"p{i}", f"T{i}", f"red house number {i}") for i in range(10)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, PASSAGES)
    return path


def test_round_trip(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = build_shards(
        corpus, tmp_path / "index", CONFIG, lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert read_manifest(tmp_path / "index") == manifest
    assert (manifest.passages, manifest.dense_size, len(manifest.shards)) == (10, None, 3)
    assert manifest.average_words == 5
    assert manifest.encoder_config == CONFIG.encoder
    rows = [row for name in manifest.shards for row in read_shard(tmp_path / "index" / name)]
    assert [passage for passage, _ in rows] == PASSAGES
    expected = Bm25Encoder(5.0).encode_passages([p.contents for p in PASSAGES])
    for (_, vector), other in zip(rows, expected, strict=True):
        assert isinstance(vector, SparseVector)
        assert isinstance(other, SparseVector)
        assert vector.indices == other.indices
        assert vector.values == pytest.approx(other.values)


def test_killed_run_encodes_only_what_is_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "index"
    whole = build_shards(corpus, tmp_path / "whole", CONFIG, lambda *_: None)

    def kill(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(corpus, folder, CONFIG, kill)
    with pytest.raises(UserError, match="run the index stage first"):
        read_manifest(folder)
    encoded: list[str] = []

    class Counting(Bm25Encoder):
        def encode_passages(self, texts: list[str]) -> list[Vector]:
            encoded.extend(texts)
            return super().encode_passages(texts)

    monkeypatch.setattr(shards, "make_encoder", lambda config, average_words: Counting(average_words))
    assert build_shards(corpus, folder, CONFIG, lambda *_: None) == whole
    assert encoded == [p.contents for p in PASSAGES[8:]]
    for name in whole.shards:
        assert pq.read_table(folder / name).equals(pq.read_table(tmp_path / "whole" / name))


def test_digest_names_passages_and_encoder(corpus: Path, tmp_path: Path) -> None:
    def digest(folder: str, config: RetrievalConfig = CONFIG) -> str:
        return build_shards(corpus, tmp_path / folder, config, lambda *_: None).digest

    first = digest("a")
    assert digest("b") == first
    assert digest("c", CONFIG.model_copy(update={"top_k": 9})) == first
    assert (
        digest("d", CONFIG.model_copy(update={"encoder": EncoderConfig(kind="bm25", max_tokens=9)})) != first
    )
    write_jsonl(corpus, [*PASSAGES[:9], Passage("p9", "T9", "other")])
    assert digest("e") != first


def test_bad_corpora(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    write_jsonl(corpus, [PASSAGES[0], PASSAGES[1], PASSAGES[0]])
    with pytest.raises(UserError, match=r"corpus\.jsonl:3: id 'p0' was used"):
        build_shards(corpus, tmp_path / "index", CONFIG, lambda *_: None)
    corpus.write_text("")
    with pytest.raises(UserError, match="no passages in this file"):
        build_shards(corpus, tmp_path / "index", CONFIG, lambda *_: None)
    assert list((tmp_path / "index").iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"digest": "x"}), "3"])
def test_bad_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not an index manifest"):
        read_manifest(tmp_path)


def test_shards_are_plain_parquet(corpus: Path, tmp_path: Path) -> None:
    manifest = build_shards(corpus, tmp_path / "index", CONFIG, lambda *_: None)
    schema = pq.read_schema(tmp_path / "index" / manifest.shards[0])
    assert schema.names == ["id", "title", "text", "vector"]
    assert pa.types.is_struct(schema.field("vector").type)
