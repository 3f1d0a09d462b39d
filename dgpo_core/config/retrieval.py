"""Encoder and index."""

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from dgpo_core.config.base import Section


class EncoderConfig(Section):
    """`bm25`: sparse vectors, scored by Qdrant with its IDF modifier; the other fields are ignored.

    `dense`: a transformers encoder with mean pooling; the defaults are E5's (method.md, section 7).
    `sentence-transformers`: a model of that library, which knows its own pooling, prompts and normalisation;
    prefixes that are not set are empty then.
    """

    kind: Literal["bm25", "dense", "sentence-transformers"] = "dense"
    model: str = Field("intfloat/e5-base-v2", description="hub name or folder of the dense encoder")
    revision: str | None = Field(None, description="pinned revision on the hub")
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: PositiveInt = Field(256, description="of a text; what follows is cut")
    batch_size: PositiveInt = Field(64, description="texts in one forward pass")

    @model_validator(mode="before")
    @classmethod
    def _without_e5_prefixes(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "sentence-transformers":
            return {"query_prefix": "", "passage_prefix": "", **values}
        return values


class RetrievalConfig(Section):
    encoder: EncoderConfig = EncoderConfig()
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="in which passages are encoded; their vectors are stored as float16"
    )
    vectors: list[str] = Field(
        [],
        description="a flat faiss index of the corpus's passages, taken instead of encoding them: "
        "its file, or its parts in order; local, or hf:// as in data.published",
    )
    location: str = Field("embedded", description='"embedded", or the URL of a Qdrant server')
    shard_size: PositiveInt = Field(50_000, description="passages in one file of vectors")
    top_k: PositiveInt = Field(3, description="passages shown for a query")

    @model_validator(mode="after")
    def _vectors_are_dense(self) -> Self:
        if self.vectors and self.encoder.kind == "bm25":
            raise ValueError("vectors: a faiss index has dense vectors; set the encoder that made them")
        return self
