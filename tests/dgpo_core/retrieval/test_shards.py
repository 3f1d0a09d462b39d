"""Shards on disk: what is encoded or imported, on how many devices, and what is kept of a killed run."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_core.config.retrieval import EncoderConfig, RetrievalConfig
from dgpo_core.datasets.records import Passage, write_jsonl
from dgpo_core.errors import InfrastructureError, UserError
from dgpo_core.retrieval import shards
from dgpo_core.retrieval.encoders import Bm25Encoder, OnEncoded, SparseVector, dense_column
from dgpo_core.retrieval.shards import (
    FlatIndex,
    Job,
    Manifest,
    build_shards,
    encode_shards,
    make_encoder,
    read_manifest,
    read_shard,
    write_shard,
)
from tests.dgpo_core.retrieval.flat import write_parts

CONFIG = RetrievalConfig(encoder=EncoderConfig(kind="bm25"), shard_size=4)
PASSAGES = [Passage(f"p{i}", f"T{i}", f"red house number {i}") for i in range(10)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, PASSAGES)
    return path


def build(corpus: Path, folder: Path, config: RetrievalConfig = CONFIG, **options: Any) -> Manifest:
    return build_shards(corpus, folder, config, options.pop("progress", lambda *_: None), **options)


def test_round_trip(corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[float, float, str]] = []
    manifest = build_shards(corpus, tmp_path / "index", CONFIG, lambda *told: seen.append(told))
    assert seen == [(4, 10, "passages"), (8, 10, "passages"), (10, 10, "passages")]
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
    whole = build(corpus, tmp_path / "whole")

    def kill(done: float, *_: object) -> None:
        if done == 10:  # told of before the third shard is written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(corpus, folder, CONFIG, kill)
    with pytest.raises(UserError, match="run the index stage first"):
        read_manifest(folder)
    encoded: list[str] = []

    class Counting(Bm25Encoder):
        def passage_column(self, texts: list[str], on_encoded: OnEncoded) -> pa.Array:
            encoded.extend(texts)
            return super().passage_column(texts, on_encoded)

    monkeypatch.setattr(shards, "make_encoder", lambda config, average_words: Counting(average_words))
    assert build(corpus, folder) == whole
    assert encoded == [p.contents for p in PASSAGES[8:]]
    for name in whole.shards:
        assert pq.read_table(folder / name).equals(pq.read_table(tmp_path / "whole" / name))


def test_digest_names_passages_and_encoder(corpus: Path, tmp_path: Path) -> None:
    def digest(folder: str, config: RetrievalConfig = CONFIG) -> str:
        return build(corpus, tmp_path / folder, config).digest

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
        build(corpus, tmp_path / "index")
    corpus.write_text("")
    with pytest.raises(UserError, match="no passages in this file"):
        build(corpus, tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"digest": "x"}), "3"])
def test_bad_manifests(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: not an index manifest"):
        read_manifest(tmp_path)


def test_shards_are_plain_parquet(corpus: Path, tmp_path: Path) -> None:
    manifest = build(corpus, tmp_path / "index")
    schema = pq.read_schema(tmp_path / "index" / manifest.shards[0])
    assert schema.names == ["id", "title", "text", "vector"]
    assert pa.types.is_struct(schema.field("vector").type)


@pytest.fixture
def dense(bert: Path) -> RetrievalConfig:
    return RetrievalConfig(encoder=EncoderConfig(model=str(bert), batch_size=2), shard_size=3)


def same_files(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.iterdir())
    return names == sorted(path.name for path in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def test_dense_vectors_are_stored_in_half_precision(
    corpus: Path, tmp_path: Path, dense: RetrievalConfig
) -> None:
    manifest = build(corpus, tmp_path / "index", dense)
    assert manifest.dense_size == 16
    schema = pq.read_schema(tmp_path / "index" / manifest.shards[0])
    assert schema.field("vector").type.value_type == pa.float16()
    rows = [row for name in manifest.shards for row in read_shard(tmp_path / "index" / name)]
    assert [passage for passage, _ in rows] == PASSAGES
    expected = make_encoder(dense.encoder, 5.0).encode_passages([p.contents for p in PASSAGES])
    np.testing.assert_allclose(np.array([vector for _, vector in rows]), np.array(expected), atol=1e-3)


def test_long_shards_are_read_in_pieces(tmp_path: Path) -> None:
    """More passages than are read at once; vectors stay with their passages."""
    count = 2 * shards.READ_AT_ONCE + 7
    vectors = np.arange(2 * count, dtype=np.float32).reshape(count, 2) % 1024
    passages = [Passage(str(i), f"T{i}", "x") for i in range(count)]
    write_shard(tmp_path / "s.parquet", passages, dense_column(vectors))
    rows = list(read_shard(tmp_path / "s.parquet"))
    assert [passage for passage, _ in rows] == passages
    assert [vector for _, vector in rows] == vectors.tolist()


@pytest.mark.thorough
def test_two_processes_write_what_one_writes(corpus: Path, tmp_path: Path, dense: RetrievalConfig) -> None:
    seen: list[float] = []
    one = build(corpus, tmp_path / "one", dense, devices=["cpu"])
    two = build(
        corpus, tmp_path / "two", dense, progress=lambda n, *_: seen.append(n), devices=["cpu", "cpu:0"]
    )
    assert one == two
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert seen == sorted(seen)
    assert seen[-1] == 10


@pytest.mark.thorough
def test_a_process_that_dies_or_fails_is_told_of(corpus: Path, tmp_path: Path) -> None:
    jobs = [Job(tmp_path / f"{i}.parquet", i, PASSAGES[:1]) for i in range(40)]
    for broken, message in (
        (_dies, "the process that encodes on b ended with 7"),
        (_fails, "failed: no room"),
    ):
        with pytest.raises(InfrastructureError, match=message):
            encode_shards(iter(jobs), broken, ["a", "b"], lambda _: None)


def _dies(device: str) -> Bm25Encoder:
    if device == "b":
        os._exit(7)
    return Bm25Encoder(5.0)


def _fails(device: str) -> Bm25Encoder:
    raise MemoryError("no room")


BUILD = """
import sys, json
from pathlib import Path
from dgpo_core.config.retrieval import RetrievalConfig
from dgpo_core.retrieval.shards import build_shards
def slowly(done, total, unit):
    import time
    print(done, flush=True)
    time.sleep(0.2)
build_shards(Path(sys.argv[1]), Path(sys.argv[2]), RetrievalConfig.model_validate_json(sys.argv[3]), slowly)
"""


@pytest.mark.thorough
def test_sigkill_and_again_gives_the_same_bytes(corpus: Path, tmp_path: Path, dense: RetrievalConfig) -> None:
    build(corpus, tmp_path / "whole", dense)
    command = [sys.executable, "-c", BUILD, str(corpus), str(tmp_path / "index"), dense.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout
        while int(killed.stdout.readline()) < 5:
            pass
        killed.send_signal(signal.SIGKILL)
    assert (tmp_path / "index/shard-00000.parquet").exists()
    assert not (tmp_path / "index/manifest.json").exists()
    before = (tmp_path / "index/shard-00000.parquet").stat().st_mtime_ns
    build(corpus, tmp_path / "index", dense)
    assert same_files(tmp_path / "whole", tmp_path / "index")
    assert (tmp_path / "index/shard-00000.parquet").stat().st_mtime_ns == before


class TestImport:
    """Vectors of a faiss index, written by faiss, in place of encoded ones."""

    @pytest.fixture
    def vectors(self, dense: RetrievalConfig) -> np.ndarray:
        texts = [passage.contents for passage in PASSAGES]
        return np.array(make_encoder(dense.encoder, 5.0).encode_passages(texts), np.float32)

    @pytest.fixture
    def parts(self, tmp_path: Path, vectors: np.ndarray) -> list[Path]:
        return write_parts(tmp_path, vectors)

    def test_same_shards_as_from_encoding(
        self, corpus: Path, tmp_path: Path, dense: RetrievalConfig, parts: list[Path]
    ) -> None:
        own = build(corpus, tmp_path / "encoded", dense)
        imported = build(corpus, tmp_path / "imported", dense, imported=FlatIndex(parts, "hash"))
        assert replace(imported, digest=own.digest, collection=own.collection) == own
        assert imported.digest != own.digest
        for name in own.shards:
            first, second = (list(read_shard(tmp_path / place / name)) for place in ("encoded", "imported"))
            assert [passage for passage, _ in first] == [passage for passage, _ in second]
            np.testing.assert_allclose(
                np.array([v for _, v in first]), np.array([v for _, v in second]), atol=1e-3
            )

    def test_what_does_not_fit_is_refused(
        self, corpus: Path, tmp_path: Path, dense: RetrievalConfig, vectors: np.ndarray
    ) -> None:
        def refusal(wrong: np.ndarray) -> str:
            index = FlatIndex(write_parts(tmp_path, wrong), "hash")
            with pytest.raises(UserError) as caught:
                build(corpus, tmp_path / "index", dense, imported=index)
            return str(caught.value)

        assert "9 vectors for 10 passages of the corpus" in refusal(vectors[:9])
        narrow = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
        assert "vectors of 8 numbers, but those of the encoder" in refusal(narrow)
        assert "vector 0 is not that of passage 'p0'" in refusal(-vectors)
        assert "vector 3 has length 2, not 1" in refusal(
            vectors * np.where(np.arange(10) == 3, 2, 1)[:, None]
        )


@pytest.fixture
def vectors() -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True))


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("kind", ["Flat", "L2norm,Flat"])
def test_rows_are_those_that_faiss_reads(tmp_path: Path, vectors: np.ndarray, parts: int, kind: str) -> None:
    """Whatever the parts, which cut through vectors and even through the header."""
    paths = write_parts(tmp_path, vectors, parts, kind)
    if kind != "Flat":
        with pytest.raises(UserError, match="not a flat faiss index"):
            FlatIndex(paths, "hash")
        return
    index = FlatIndex(paths, "hash")
    oracle = faiss.read_index(str(tmp_path / "whole.index"))
    assert (index.count, index.size) == (oracle.ntotal, oracle.d)
    for start, stop in ((0, 50), (0, 1), (17, 31), (49, 50), (3, 3)):
        expected = oracle.reconstruct_n(start, stop - start) if stop > start else np.empty((0, 12))
        np.testing.assert_array_equal(index.rows(start, stop), expected)


def test_an_index_by_distance_has_the_same_vectors(tmp_path: Path, vectors: np.ndarray) -> None:
    index = faiss.IndexFlatL2(12)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "l2.index"))
    np.testing.assert_array_equal(FlatIndex([tmp_path / "l2.index"], "hash").rows(0, 50), vectors)


def test_parts_that_are_missing_cut_or_swapped(tmp_path: Path, vectors: np.ndarray) -> None:
    first, second, third = write_parts(tmp_path, vectors)
    with pytest.raises(UserError, match="is a part missing, or not whole"):
        FlatIndex([first, second], "hash")
    with pytest.raises(UserError, match="or not its first part"):
        FlatIndex([second, first, third], "hash")
    third.write_bytes(third.read_bytes()[:-4])
    with pytest.raises(UserError, match="2,441 bytes, but 50 vectors of 12 take 2,445"):
        FlatIndex([first, second, third], "hash")
    first.write_bytes(b"IxFI")
    with pytest.raises(UserError, match="not a flat faiss index"):
        FlatIndex([first], "hash")


def test_swapped_parts_after_the_first_are_seen_by_their_lengths(tmp_path: Path, vectors: np.ndarray) -> None:
    """Parts are cut anywhere, so numbers of two vectors are mixed."""
    first, second, third = write_parts(tmp_path, vectors)
    cut = second.read_bytes()
    second.write_bytes(third.read_bytes()[:6] + cut[6:])
    with pytest.raises(UserError, match=r"vector \d+ has length"):
        FlatIndex([first, second, third], "hash").rows(0, 50)
