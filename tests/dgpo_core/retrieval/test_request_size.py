"""Requests are cut by number and bytes, and the bytes are never more than counted."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from qdrant_client import models

from dgpo_core.retrieval.encoders import SparseVector
from dgpo_core.retrieval.qdrant_server import to_qdrant
from dgpo_core.retrieval.request_size import batches, text_bytes, vector_bytes


@given(st.lists(st.integers(0, 12)), st.integers(1, 5), st.integers(1, 20))
def test_every_item_is_in_one_batch_and_none_could_be_larger(sizes: list[int], most: int, limit: int) -> None:
    cut = list(batches(sizes, most, limit, lambda size: size))
    assert [size for batch in cut for size in batch] == sizes
    for batch in cut:
        assert 1 <= len(batch) <= most
        assert sum(batch) <= limit or len(batch) == 1
    for batch, following in pairwise(cut):
        assert len(batch) == most or sum(batch) + following[0] > limit


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@given(st.text(), st.lists(NUMBERS, min_size=1), st.lists(st.tuples(st.integers(0, 2**32 - 1), NUMBERS)))
def test_no_more_is_sent_than_was_counted(
    text: str, dense: list[float], sparse: list[tuple[int, float]]
) -> None:
    def sent(vector: object) -> int:
        return len(models.PointStruct(id=0, vector={"v": vector}, payload={}).model_dump_json().encode())

    def payload(text: str) -> int:
        return len(models.PointStruct(id=0, vector={}, payload={"t": text}).model_dump_json().encode())

    around = 100  # names and brackets
    assert payload(text) <= text_bytes(text) + around
    for vector in (dense, SparseVector([i for i, _ in sparse], [value for _, value in sparse])):
        assert sent(to_qdrant(vector)) <= vector_bytes(vector) + around
