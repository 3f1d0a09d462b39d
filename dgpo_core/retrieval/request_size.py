"""Cut what is sent to a server into requests that it takes: by number of parts, and by bytes."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dgpo_core.retrieval.encoders import SparseVector, Vector

T = TypeVar("T")
JSON_CHARACTER = 6  # bytes at most: a control character is \\u0001
JSON_NUMBER = 26  # bytes at most, with its comma: -1.2345678901234567e-300


def batches(items: Iterable[T], most: int, most_bytes: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Cut `items` into lists of at most `most` items and `most_bytes` bytes; a larger item is alone."""
    batch: list[T] = []
    total = 0
    for item in items:
        own = size(item)
        if batch and (len(batch) == most or total + own > most_bytes):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += own
    if batch:
        yield batch


def text_bytes(text: str) -> int:
    """Return the most bytes that a text takes in a request."""
    return JSON_CHARACTER * len(text)


def vector_bytes(vector: Vector) -> int:
    """Return the most bytes that a vector takes in a request."""
    numbers = 2 * len(vector.indices) if isinstance(vector, SparseVector) else len(vector)
    return JSON_NUMBER * numbers
