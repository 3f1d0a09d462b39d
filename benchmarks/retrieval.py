"""Bytes, recall and speed of the server recipe at small sizes: `python -m benchmarks.retrieval [POINTS ...]`.

Qdrant's engine in this process (qdrant-edge-py: the server's core) with the settings that `retrieval.qdrant`
gives a server's collection: float16 originals on disk, quantised vectors, HNSW, rescoring. Vectors are random
ones around 2,000 centres, 768 wide; passages have 100 words, drawn by Zipf's law. Then, by arithmetic, what
the bytes a passage come to at 0.1, 1 and 21 million passages. Memory is what has to be there for quick
answers: quantised vectors, graph, ids, or the sparse index; the originals and the texts are read from disk.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import qdrant_edge as edge

from dgpo_core.config.retrieval import QdrantConfig
from dgpo_core.retrieval.encoders import Bm25Encoder

SIZE, WORDS, CENTRES, QUERIES, TOP_K = 768, 100, 2_000, 200, 3
VOCABULARY = 200_000
BLOCK = 10_000  # passages that are drawn at a time
SCALES = (100_000, 1_000_000, 21_015_324)
PARTS = {
    "originals": "vector_storage-text/matrix",
    "quantised": "vector_storage-text/quantized",
    "graph": "vector_index-text/links",
    "sparse vectors": "vector_storage-bm25/",
    "sparse index": "vector_index-bm25/",
    "texts": "payload_storage/",
    "ids": "id_tracker",
}
IN_MEMORY = ("quantised", "graph", "sparse index", "ids")


class Data(NamedTuple):
    """Passages and queries: dense vectors [count, SIZE] float32, of length 1; texts with BM25 vectors."""

    vectors: np.ndarray
    queries: np.ndarray
    texts: list[str]
    terms: list[Any]


def make_data(points: int) -> Data:
    """Draw `points` passages and QUERIES queries, always the same."""
    texts = make_texts(points)
    return Data(*make_vectors(points, SIZE), texts, Bm25Encoder(WORDS).encode_passages(texts))


def make_texts(points: int, ending: str = "") -> list[str]:
    """Draw texts of WORDS words; every word of the vocabulary ends in `ending`."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 10))) + ending for _ in range(VOCABULARY)]
    blocks = (range(start, min(start + BLOCK, points)) for start in range(0, points, BLOCK))
    drawn = (np.minimum(rng.zipf(1.15, size=(len(block), WORDS)), VOCABULARY) - 1 for block in blocks)
    return [" ".join([words[rank] for rank in row]) for ranks in drawn for row in ranks.tolist()]


def make_vectors(points: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the vectors of `points` passages and of QUERIES queries: [count, size] float32, of length 1."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CENTRES, size)).astype(np.float32)

    def around(count: int) -> np.ndarray:
        vectors = np.empty((count, size), np.float32)
        for start in range(0, count, BLOCK):
            block = vectors[start : start + BLOCK]
            block[:] = centres[rng.integers(CENTRES, size=len(block))]
            block += rng.normal(size=block.shape).astype(np.float32)
            block /= np.linalg.norm(block, axis=1, keepdims=True)
        return vectors

    return around(points), around(QUERIES)


def quantisation(kind: str) -> Any:
    """Return the engine's settings of a kind of quantisation."""
    pinned = edge.Memory.Pinned
    if kind == "int8":
        return edge.ScalarQuantizationConfig(type=edge.ScalarType.Int8, quantile=0.99, memory=pinned)
    return edge.BinaryQuantizationConfig(memory=pinned) if kind == "binary" else None


def build(folder: str, data: Data, kind: str) -> Any:
    """Build a collection in `folder`: of BM25, or of dense vectors with the quantisation `kind`."""
    recipe = QdrantConfig()
    dense = edge.EdgeVectorParams(
        size=SIZE,
        distance=edge.Distance.Dot,
        datatype=edge.VectorStorageDatatype.Float16,
        memory=edge.Memory.Cold,
        quantization_config=quantisation(kind),
    )
    sparse = edge.EdgeSparseVectorParams(modifier=edge.Modifier.Idf)
    config = edge.EdgeConfig(
        vectors={} if kind == "bm25" else {"text": dense},
        sparse_vectors={"bm25": sparse} if kind == "bm25" else {},
        hnsw_config=edge.HnswIndexConfig(recipe.hnsw_m, recipe.hnsw_ef_construct, full_scan_threshold=1),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1),
        wal_enabled=False,
    )
    engine = edge.EdgeShard.create(folder, config)
    for start in range(0, len(data.texts), 1000):
        rows = range(start, min(start + 1000, len(data.texts)))
        engine.update(edge.UpdateOperation.upsert_points([point(data, row, kind) for row in rows]))
    engine.optimize()
    engine.flush()
    return engine


def point(data: Data, row: int, kind: str) -> Any:
    """Make a passage's point of a collection."""
    terms = data.terms[row]
    vector: dict[str, Any] = {"text": data.vectors[row].tolist()}
    if kind == "bm25":
        vector = {"bm25": edge.SparseVector(terms.indices, terms.values)}
    return edge.Point(row, vector, {"id": str(row), "title": "A title", "text": data.texts[row]})


def bytes_a_point(folder: str, points: int) -> dict[str, float]:
    """Measure the files of each part, without their holes; the emptied segment is left out."""
    segments = [path for path in Path(folder).glob("segments/*") if (path / "id_tracker.mappings").exists()]
    found = dict.fromkeys(PARTS, 0.0)
    for path in (path for segment in segments for path in segment.rglob("*") if path.is_file()):
        for part, place in PARTS.items():
            if place in path.as_posix():
                found[part] += path.stat().st_blocks * 512 / points
    return found


def measure_search(engine: Any, data: Data, kind: str, oversampling: float) -> tuple[float, float]:
    """Return recall@3 against exact search in numpy, and milliseconds a query."""
    rescored = edge.QuantizationSearchParams(rescore=True, oversampling=oversampling)
    quantization = None if kind == "none" else rescored
    params = edge.SearchParams(hnsw_ef=QdrantConfig().hnsw_ef, quantization=quantization)
    requests = [
        edge.QueryRequest(limit=TOP_K, query=edge.Query.Nearest(query.tolist(), using="text"), params=params)
        for query in data.queries
    ]
    started = time.perf_counter()
    found = [{point.id for point in engine.query(request)} for request in requests]
    milliseconds = (time.perf_counter() - started) / QUERIES * 1000
    exact = np.argsort(-(data.queries @ data.vectors.T), axis=1)[:, :TOP_K].tolist()
    shares = [len(some & set(best)) / TOP_K for some, best in zip(found, exact, strict=True)]
    return float(np.mean(shares)), milliseconds


def main(sizes: list[int]) -> None:
    measured: dict[str, dict[str, float]] = {}
    for points in sizes:
        data = make_data(points)
        text = np.mean([len(text) for text in data.texts])
        print(f"{points:,} passages of {text:.0f} characters, {SIZE} dimensions", flush=True)
        for kind in ("none", "int8", "binary", "bm25"):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                engine = build(folder, data, kind)
                seconds = time.perf_counter() - started
                measured[kind] = bytes_a_point(folder, points)
                told = "  ".join(f"{part} {size:.0f}" for part, size in measured[kind].items() if size >= 0.5)
                print(f"  {kind:7} built in {seconds:.1f} s; bytes a passage: {told}", flush=True)
                for oversampling in () if kind == "bm25" else (1.0, 3.0, 10.0):
                    recall, ms = measure_search(engine, data, kind, oversampling)
                    print(f"    oversampling {oversampling:4.1f}: recall@3 {recall:.3f}, {ms:.2f} ms")
                engine.close()
    print("\n| passages | collection | memory | disk |\n|---|---|---|---|")
    for scale in SCALES:
        for kind, parts in measured.items():
            memory = sum(parts[part] for part in IN_MEMORY)
            print(f"| {scale:,} | {kind} | {giga(memory * scale)} | {giga(sum(parts.values()) * scale)} |")


def giga(size: float) -> str:
    """Write a number of bytes in GB."""
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"


if __name__ == "__main__":
    main([int(points) for points in sys.argv[1:]] or [5_000, 20_000])
