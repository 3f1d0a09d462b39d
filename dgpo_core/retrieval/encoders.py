"""Texts to vectors: BM25 as Qdrant computes it, E5 and its like, or any model of sentence-transformers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import qdrant_edge
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import UserError
from dgpo_core.hub import HTTP_ERROR, load_error
from dgpo_core.text import canonical, spaced, start_of

BUFFER = 64  # batches whose texts are sorted by length together
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
    """Qdrant's own BM25: term weights here (stemmed English words), IDF in the index.

    Texts go in in one Unicode spelling, so that a word finds itself however it was written; scripts without
    spaces go in by pairs of characters (`spaced`).
    """

    size: int | None = None

    def __init__(self, average_words: float) -> None:
        self._bm25 = qdrant_edge.Bm25(qdrant_edge.Bm25Config(avg_len=average_words, language="english"))

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


class DenseEncoder(ABC):
    """Adds prefixes, and checks the vectors that `_encode` makes of one buffer of texts at a time."""

    size: int

    def __init__(self, config: EncoderConfig) -> None:
        self._config = config

    @abstractmethod
    def _encode(self, texts: list[str], query: bool, on_encoded: OnEncoded) -> NDArray[np.float32]:
        """Encode texts as [texts, size] vectors of length 1."""

    def encode_passages(self, texts: list[str]) -> list[Vector]:
        return self._in_buffers(texts, False).tolist()  # type: ignore[no-any-return]

    def encode_queries(self, texts: list[str]) -> list[Vector]:
        return self._in_buffers(texts, True).tolist()  # type: ignore[no-any-return]

    def passage_column(self, texts: list[str], on_encoded: OnEncoded) -> pa.Array:
        return dense_column(self._in_buffers(texts, False, on_encoded))

    def _in_buffers(
        self, texts: list[str], query: bool, on_encoded: OnEncoded = lambda count: None
    ) -> NDArray[np.float32]:
        prefix = self._config.query_prefix if query else self._config.passage_prefix
        vectors = np.empty((len(texts), self.size), np.float32)
        step = BUFFER * self._config.batch_size
        for start in range(0, len(texts), step):
            buffer = [prefix + text for text in texts[start : start + step]]
            vectors[start : start + step] = self._encode(buffer, query, on_encoded)
        if not np.isfinite(vectors).all():
            raise UserError(
                f"retrieval.encoder.model: {self._config.model!r} makes vectors that are not numbers; where "
                "float16 is too small for it, set retrieval.precision to bfloat16 or float32"
            )
        return vectors


class MeanPoolingEncoder(DenseEncoder):
    """Encodes by mean pooling over tokens, L2-normalised (E5's model card): inner product is the cosine.

    Texts of similar length share a batch, so that little padding is computed; the next batches are tokenised
    while the model computes. Raises UserError for a model that cannot be loaded.
    """

    def __init__(self, config: EncoderConfig, device: str = "cpu", precision: str = "float32") -> None:
        super().__init__(config)
        self._device = device
        with _errors_with_model(config):
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
            dtype = getattr(torch, precision)
            model = AutoModel.from_pretrained(config.model, revision=config.revision, dtype=dtype)
        self._model = model.to(device).eval()
        self.size = int(model.config.hidden_size)

    @torch.inference_mode()
    def _encode(self, texts: list[str], query: bool, on_encoded: OnEncoded) -> NDArray[np.float32]:
        longest_first = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        size = self._config.batch_size
        batches = [longest_first[start : start + size] for start in range(0, len(texts), size)]
        pooled = []
        with ThreadPoolExecutor(1) as ahead:
            tokenized = ahead.map(lambda batch: self._tokenize([texts[i] for i in batch]), batches)
            for batch, inputs in zip(batches, tokenized, strict=True):
                inputs = inputs.to(self._device)
                hidden = self._model(**inputs).last_hidden_state.float()
                mask = inputs["attention_mask"][..., None].float()
                pooled.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
                on_encoded(len(batch))
        vectors = np.empty((len(texts), self.size), np.float32)
        vectors[longest_first] = torch.cat(pooled).cpu().numpy()
        return vectors

    def _tokenize(self, texts: list[str]) -> Any:
        starts = [start_of(text, self._ids, self._config.max_tokens) for text in texts]
        return self._tokenizer(
            starts, max_length=self._config.max_tokens, padding=True, truncation=True, return_tensors="pt"
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, verbose=False)  # type: ignore[no-any-return]  # of a text too long


class SentenceTransformersEncoder(DenseEncoder):
    """Encodes by any model of sentence-transformers (extra `encoders`), with its pooling and prompts.

    Vectors are normalised, whatever the model does. Raises UserError where library or model is missing.
    """

    def __init__(self, config: EncoderConfig, device: str = "cpu", precision: str = "float32") -> None:
        super().__init__(config)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "retrieval.encoder.kind: sentence-transformers is not installed; "
                "pip install -c constraints/main.txt -e '.[encoders]'"
            ) from error
        with _errors_with_model(config):
            self._model = SentenceTransformer(
                config.model, revision=config.revision, device=device, model_kwargs={"dtype": precision}
            )
        own = self._model.max_seq_length
        self._model.max_seq_length = min(own, config.max_tokens) if own else config.max_tokens
        self.size = int(self._model.get_embedding_dimension() or 0)

    def _encode(self, texts: list[str], query: bool, on_encoded: OnEncoded) -> NDArray[np.float32]:
        encode = self._model.encode_query if query else self._model.encode_document
        vectors = encode(
            [self._start(text) for text in texts],
            batch_size=self._config.batch_size,
            show_progress_bar=False,
            normalize_embeddings=True,
        )
        on_encoded(len(texts))
        return np.asarray(vectors, np.float32)

    def _start(self, text: str) -> str:
        tokenizer, limit = self._model.tokenizer, self._model.max_seq_length
        if limit is None or not isinstance(tokenizer, PreTrainedTokenizerBase):  # as static word vectors
            return text
        return start_of(text, lambda part: tokenizer.encode(part, verbose=False), limit)


def dense_column(vectors: NDArray[np.floating]) -> pa.Array:
    """Return [passages, size] as shards store it: lists of float16."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])


@contextmanager
def _errors_with_model(config: EncoderConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, HTTP_ERROR) as error:
        raise load_error(f"retrieval.encoder.model: cannot load {config.model!r}", error) from error


def make_encoder(
    config: EncoderConfig, average_words: float, device: str = "cpu", precision: str = "float32"
) -> Encoder:
    """Make the encoder of `config`; `average_words` is the corpus's mean passage length, for BM25 alone."""
    if config.kind == "bm25":
        return Bm25Encoder(average_words)
    kind = MeanPoolingEncoder if config.kind == "dense" else SentenceTransformersEncoder
    return kind(config, device, precision)
