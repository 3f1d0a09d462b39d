"""Memory and disk of a Qdrant server for the corpus, from bytes a passage (docs/scaling.md)."""

import math
from dataclasses import dataclass

from dgpo_core.config.retrieval import QdrantConfig, RetrievalConfig

# Measured by benchmarks/retrieval.py at 100 words a passage: bytes of a passage's id, and of its words
IDS = 22.0
TEXT, SPARSE_VECTORS, SPARSE_INDEX = 6.09, 5.24, 5.03
QUANTISED = {"none": 2.0, "int8": 1.0, "binary": 1 / 8}  # bytes a dimension of what every query touches
OFFSET = 5.0  # bytes of an int8 vector beside its numbers


@dataclass(frozen=True)
class Server:
    """Bytes in all: `memory` of what every query touches, `disk` of everything (while it indexes, up to twice
    as much)."""

    memory: float
    disk: float


def qdrant_server(retrieval: RetrievalConfig, passages: int, words: float, dimensions: int) -> Server:
    """Of `passages` of so many `words`, in all replicas; `dimensions` 0: BM25 alone."""
    config = retrieval.qdrant
    memory = disk = IDS
    disk += TEXT * words
    if dimensions:
        searched = QUANTISED[config.quantization] * dimensions + OFFSET * (config.quantization == "int8")
        graph, originals = graph_bytes(config, passages), 2.0 * dimensions
        memory += searched + graph
        disk += originals + graph + (searched if config.quantization != "none" else 0)
    if retrieval.hybrid or not dimensions:
        memory += SPARSE_INDEX * words
        disk += (SPARSE_VECTORS + SPARSE_INDEX) * words
    copies = float(passages * config.replicas)
    return Server(memory * copies, disk * copies)


def graph_bytes(config: QdrantConfig, passages: int) -> float:
    """Of a passage in the HNSW graph, at most (Malkov and Yashunin 2016, arXiv:1603.09320): 2 m edges in the
    lowest layer and m in each above, which has 1 / m of the nodes; an edge has the bits of a number."""
    edges = 2 * config.hnsw_m + config.hnsw_m / max(1, config.hnsw_m - 1)
    return edges * math.ceil(math.log2(max(2, passages))) / 8
