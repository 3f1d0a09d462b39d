"""Texts to vectors: BM25 as Qdrant computes it; the dense ones are in dense_encoders.py."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import qdrant_edge
from numpy.typing import NDArray

from dgpo_core.text import canonical, spaced

OnEncoded = Callable[[int], None]  # is told that so many more texts are encoded


@dataclass(frozen=True)
class SparseVector:
    indices: list[int]
    values: list[float]


Vector = SparseVector | list[float]


class Encoder(Protocol):
    """Encodes texts as vectors; `size` is the dimension of dense ones, None for sparse ones."""

    @property
    def size(self) -> int | None: ...

    def encode_passages(self, texts: list[str]) -> list[Vector]: ...

    def encode_queries(self, texts: list[str]) -> list[Vector]: ...

    def passage_column(self, texts: list[str], on_encoded: OnEncoded) -> pa.Array:
        """Encode passages as a column of a shard (dense vectors in float16), telling how many are done."""
        ...


class Bm25Encoder:
    """Qdrant's own BM25: term weights here (of the language's stemmed words), IDF in the index.

    Texts go in in one Unicode spelling, so that a word finds itself however it was written; scripts without
    spaces go in by pairs of characters (`spaced`).
    """

    size: int | None = None

    def __init__(self, average_words: float, language: str = "english") -> None:
        self._bm25 = qdrant_edge.Bm25(qdrant_edge.Bm25Config(avg_len=average_words, language=language))

    def encode_passages(self, texts: list[str]) -> list[Vector]:
        return [_sorted_terms(self._bm25.embed_document(_words(text))) for text in texts]

    def encode_queries(self, texts: list[str]) -> list[Vector]:
        return [_sorted_terms(self._bm25.embed_query(_words(text))) for text in texts]

    def passage_column(self, texts: list[str], on_encoded: OnEncoded) -> pa.Array:
        vectors = [self._bm25.embed_document(_words(text)) for text in texts]
        lengths = [len(vector.indices) for vector in vectors]
        terms = np.fromiter(chain.from_iterable(vector.indices for vector in vectors), np.uint32)
        weights = np.fromiter(chain.from_iterable(vector.values for vector in vectors), np.float32)
        order = np.lexsort((terms, np.repeat(np.arange(len(texts)), lengths)))
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        lists = [pa.ListArray.from_arrays(starts, values[order]) for values in (terms, weights)]
        on_encoded(len(texts))
        return pa.StructArray.from_arrays(lists, ["indices", "values"])


def _words(text: str) -> str:
    """Return `text` as BM25 splits it into terms: in one spelling, with words apart in every script."""
    return spaced(canonical(text))


def _sorted_terms(vector: Any) -> SparseVector:
    """Order the terms by their ids: the engine's own order changes from process to process."""
    pairs = sorted(zip(vector.indices, vector.values, strict=True))
    return SparseVector([index for index, _ in pairs], [value for _, value in pairs])


def dense_column(vectors: NDArray[np.floating]) -> pa.Array:
    """Return [passages, size] as shards store it: lists of float16."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])
