"""Sections about retrieval: the encoder, and the index with its location."""

from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from dgpo_core.config.base import Section

E5 = "intfloat/e5-base-v2"
E5_COMMIT = "f52bf8ec8c7124536f0efb74aca902b2995e5bcd"
Language = Literal[
    "arabic",
    "azerbaijani",
    "basque",
    "bengali",
    "catalan",
    "chinese",
    "danish",
    "dutch",
    "english",
    "finnish",
    "french",
    "german",
    "greek",
    "hebrew",
    "hinglish",
    "hungarian",
    "indonesian",
    "italian",
    "japanese",
    "kazakh",
    "nepali",
    "norwegian",
    "portuguese",
    "romanian",
    "russian",
    "slovene",
    "spanish",
    "swedish",
    "tajik",
    "turkish",
]  # Qdrant's; of those without a stemmer it knows the words that BM25 leaves out


class EncoderConfig(Section):
    """`bm25`: sparse vectors, scored by Qdrant with its IDF modifier; of the other fields, `language` counts.

    `dense`: a transformers encoder with mean pooling; the defaults are E5's.
    `sentence-transformers`: a model of that library, which knows its own pooling, prompts and normalisation;
    prefixes that are not set are empty then.
    """

    kind: Literal["bm25", "dense", "sentence-transformers"] = "dense"
    language: Language = Field(
        "english", description="whose word forms BM25 takes for one word (also of retrieval.hybrid)"
    )
    model: str = Field(E5, description="hub name or folder of the dense encoder")
    revision: str | None = Field(None, description="pinned revision on the hub; E5's own where none is set")
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_tokens: PositiveInt = Field(256, description="of a text; what follows is cut")
    batch_size: PositiveInt = Field(64, description="texts in one forward pass")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_model(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kind = values.get("kind")
        if kind == "sentence-transformers":
            values = {"query_prefix": "", "passage_prefix": "", **values}
        if kind != "bm25" and values.get("model", E5) == E5:
            values = {"revision": E5_COMMIT, **values}
        return values

    def recorded(self) -> dict[str, str | int | None]:
        """Return what an index records of its encoder: English goes without saying, as it once did."""
        return self.model_dump(exclude={"language"} if self.language == "english" else None)


class QdrantConfig(Section):
    """A collection on a Qdrant server: how it is built and searched. Other locations ignore this."""

    grpc: bool = Field(False, description="gRPC for points and queries; for cheaper uploads")
    grpc_port: PositiveInt = 6334
    shards: PositiveInt = Field(1, description="parts of the collection; a multiple of a cluster's nodes")
    replicas: PositiveInt = Field(1, description="copies of each shard in a cluster")
    quantization: Literal["none", "int8", "binary"] = Field(
        "int8", description="of the dense vectors kept in memory; the float16 originals are on disk"
    )
    oversampling: float = Field(
        3.0, ge=1.0, description="candidates of the quantised search, per hit, scored again by the originals"
    )
    hnsw_m: PositiveInt = Field(16, description="edges of a node of the HNSW graph")
    hnsw_ef_construct: PositiveInt = Field(128, description="candidates for an edge while it is built")
    hnsw_ef: PositiveInt = Field(128, description="candidates kept during a search")
    upload_batch: PositiveInt = Field(256, description="points in one request")
    upload_parallel: PositiveInt = Field(4, description="requests at the same time")

    def built(self) -> dict[str, str | int]:
        """Return the settings that a collection is built with; the others may change without a new one."""
        names = {"shards", "replicas", "quantization", "hnsw_m", "hnsw_ef_construct"}
        return self.model_dump(include=names)


class Location(NamedTuple):
    """Where the index is searched; `address` is the path of a folder or file, or a URL."""

    kind: Literal["memory", "embedded", "folder", "server", "service", "replay"]
    address: str = ""


LOCATIONS = (
    '"embedded", "embedded:<folder>", "memory", the URL of a Qdrant server (http://host:6333) or of a '
    "retriever service (retriever+http://host:8000); record:<file>+<one of these> keeps in a file what that "
    "finds, and replay:<file> finds it again"
)


def cassette_file(text: str) -> str | None:
    """Return the file into which `retrieval.location` records; None where it does not."""
    return text.removeprefix("record:").partition("+")[0] if text.startswith("record:") else None


def parse_location(text: str) -> Location:
    """Parse `retrieval.location`, one that records as what it records of.

    Raises ValueError for what is none, and for credentials, not repeated.
    """
    if file := cassette_file(text):
        searched = text.removeprefix(f"record:{file}+")
        if searched and not searched.startswith("record:"):
            return parse_location(searched)
    if text.startswith("replay:") and (file := text.removeprefix("replay:")):
        return Location("replay", file)
    if text == "memory":
        return Location("memory")
    if text == "embedded":
        return Location("embedded")
    if text.startswith("embedded:") and (folder := text.removeprefix("embedded:")):
        return Location("folder", folder)
    url = text.removeprefix("retriever+")
    try:
        parts = urlsplit(url)
    except ValueError:  # a bracket that is no IPv6 address
        raise ValueError(f"location: must be {LOCATIONS}, not {text!r}") from None
    if "@" in parts.netloc or "key=" in parts.query.lower() or "token=" in parts.query.lower():
        raise ValueError("location: no credentials in the URL; set the environment variable QDRANT_API_KEY")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"location: must be {LOCATIONS}, not {text!r}")
    return Location("server" if url == text else "service", url.rstrip("/"))


class RetrievalConfig(Section):
    """The index: its encoder, where it is searched, and how many passages a query gets."""

    # the vectors are the stage index's; how near a server's approximate search comes, `min_recall` decides
    FREE = frozenset(
        {"precision", "vectors", "location", "qdrant", "shard_size", "recall_queries", "min_recall"}
    )

    encoder: EncoderConfig = EncoderConfig()
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="in which passages are encoded; their vectors are stored as float16"
    )
    vectors: list[str] = Field(
        [],
        description="a flat faiss index of the corpus's passages, taken instead of encoding them: "
        "its file, or its parts in order; local, or hf:// as in data.published",
    )
    hybrid: bool = Field(
        False, description="search with BM25 too, and fuse both rankings by reciprocal ranks (dense encoders)"
    )
    location: str = Field("embedded", description=LOCATIONS)
    qdrant: QdrantConfig = QdrantConfig()
    shard_size: PositiveInt = Field(50_000, description="passages in one file of vectors")
    top_k: PositiveInt = Field(3, description="passages shown for a query")
    recall_queries: NonNegativeInt = Field(
        100, description="validation questions on which the index is compared with exact search; 0: none"
    )
    min_recall: float = Field(
        0.95, ge=0.0, le=1.0, description="share of the exact top_k that the index must find"
    )

    @property
    def has_encoder(self) -> bool:
        """Return whether a model encodes queries here: not for BM25, a service with its own, or a replay."""
        here = parse_location(self.location).kind not in ("service", "replay")
        return self.encoder.kind != "bm25" and here

    @model_validator(mode="after")
    def _possible(self) -> Self:
        location = parse_location(self.location)
        if self.hybrid and self.encoder.kind == "bm25":
            raise ValueError("hybrid: adds BM25 to a dense encoder; encoder.kind is bm25 already")
        if self.vectors and self.encoder.kind == "bm25":
            raise ValueError("vectors: a faiss index has dense vectors; set the encoder that made them")
        if self.vectors and location.kind == "service":
            raise ValueError("vectors: a retriever service has an index of its own; leave one of them out")
        return self
