"""Encoder and index."""

from typing import Literal

from pydantic import Field, PositiveInt

from dgpo_core.config.base import Section


class EncoderConfig(Section):
    """`bm25`: sparse vectors, scored by Qdrant with its IDF modifier. `dense`: a transformers encoder.

    The dense fields are E5's (method.md, section 7) and are ignored by `bm25`.
    """

    kind: Literal["bm25", "dense"] = "dense"
    model: str = Field("intfloat/e5-base-v2", description="hub name or folder of the dense encoder")
    revision: str | None = Field(None, description="pinned revision on the hub")
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class RetrievalConfig(Section):
    encoder: EncoderConfig = EncoderConfig()
    location: str = Field("embedded", description='"embedded", or the URL of a Qdrant server')
    shard_size: PositiveInt = Field(50_000, description="passages in one file of vectors")
    top_k: PositiveInt = Field(3, description="passages shown for a query")
