"""Texts to dense vectors: E5 and its like, or any model of sentence-transformers. It imports torch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unicodedata import normalize

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from dgpo_core.config.retrieval import EncoderConfig
from dgpo_core.errors import UserError
from dgpo_core.hub import HTTP_ERROR, load_error
from dgpo_core.retrieval.encoders import OnEncoded, Vector, dense_column
from dgpo_core.text import start_of

BUFFER = 64  # batches whose texts are sorted by length together


class DenseEncoder(ABC):
    """Adds prefixes to composed letters, and checks the vectors that `_encode` makes of a buffer of texts."""

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
            buffer = [prefix + normalize("NFC", text) for text in texts[start : start + step]]
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
            safe = {"revision": config.revision, "trust_remote_code": False}
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, **safe)
            dtype = getattr(torch, precision)
            model = AutoModel.from_pretrained(config.model, dtype=dtype, use_safetensors=True, **safe)
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
                config.model,
                revision=config.revision,
                device=device,
                model_kwargs={"dtype": precision, "use_safetensors": True},
                trust_remote_code=False,
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


@contextmanager
def _errors_with_model(config: EncoderConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, HTTP_ERROR) as error:
        raise load_error(f"retrieval.encoder.model: cannot load {config.model!r}", error) from error
