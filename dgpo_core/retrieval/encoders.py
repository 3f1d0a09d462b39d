"""Text to vectors: BM25 as Qdrant computes it, or a transformers encoder such as E5."""

from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import qdrant_edge
import torch
from transformers import AutoModel, AutoTokenizer

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import UserError


@dataclass(frozen=True)
class SparseVector:
    indices: list[int]
    values: list[float]


Vector = SparseVector | list[float]


class Encoder(Protocol):
    """`size` is the dimension of dense vectors, None for sparse; `arrow_type` is how shards store one."""

    size: int | None
    arrow_type: pa.DataType

    def encode_passages(self, texts: list[str]) -> list[Vector]: ...

    def encode_queries(self, texts: list[str]) -> list[Vector]: ...


class Bm25Encoder:
    """Qdrant's own BM25: term weights here (stemmed English words), IDF in the index."""

    size: int | None = None
    arrow_type: pa.DataType = pa.struct(
        [("indices", pa.list_(pa.uint32())), ("values", pa.list_(pa.float32()))]
    )

    def __init__(self, average_words: float) -> None:
        self._bm25 = qdrant_edge.Bm25(qdrant_edge.Bm25Config(avg_len=average_words, language="english"))

    def encode_passages(self, texts: list[str]) -> list[Vector]:
        return [_sparse(self._bm25.embed_document(text)) for text in texts]

    def encode_queries(self, texts: list[str]) -> list[Vector]:
        return [_sparse(self._bm25.embed_query(text)) for text in texts]


def _sparse(vector: Any) -> SparseVector:
    """Terms in the order of their ids: the engine's own order changes from process to process."""
    pairs = sorted(zip(vector.indices, vector.values, strict=True))
    return SparseVector([index for index, _ in pairs], [value for _, value in pairs])


class DenseEncoder:
    """Mean pooling over tokens, L2-normalised (E5's model card); inner product is the cosine."""

    def __init__(self, config: EncoderConfig, device: str = "cpu") -> None:
        self._config, self._device = config, device
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
            model = AutoModel.from_pretrained(config.model, revision=config.revision)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().split("\n")[0]
            raise UserError(f"retrieval.encoder.model: cannot load {config.model!r}: {first_line}") from error
        self._model = model.to(device).eval()
        self.size: int | None = int(model.config.hidden_size)
        self.arrow_type: pa.DataType = pa.list_(pa.float32(), self.size)

    def encode_passages(self, texts: list[str]) -> list[Vector]:
        return self._encode([self._config.passage_prefix + text for text in texts])

    def encode_queries(self, texts: list[str]) -> list[Vector]:
        return self._encode([self._config.query_prefix + text for text in texts])

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[Vector]:
        vectors: list[Vector] = []
        for start in range(0, len(texts), self._config.batch_size):
            inputs = self._tokenizer(
                texts[start : start + self._config.batch_size],
                max_length=self._config.max_tokens,
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
            hidden = self._model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors += torch.nn.functional.normalize(mean, dim=-1).float().cpu().tolist()
        return vectors


def make_encoder(config: EncoderConfig, average_words: float) -> Encoder:
    """`average_words` is the corpus's mean passage length, which BM25 needs."""
    return Bm25Encoder(average_words) if config.kind == "bm25" else DenseEncoder(config)
