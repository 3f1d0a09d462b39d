"""Flat indexes against faiss, which writes them and reads them back."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from dgpo_core.errors import UserError
from dgpo_core.retrieval.shards import FlatIndex
from tests.dgpo_core.retrieval.flat import write_parts


@pytest.fixture
def vectors() -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32)
    return np.asarray(matrix / np.linalg.norm(matrix, axis=1, keepdims=True))


@pytest.mark.parametrize("parts", [1, 2, 7])
@pytest.mark.parametrize("kind", ["Flat", "L2norm,Flat"])
def test_rows_are_those_that_faiss_reads(tmp_path: Path, vectors: np.ndarray, parts: int, kind: str) -> None:
    """Whatever the parts, which cut through vectors and even through the header."""
    paths = write_parts(tmp_path, vectors, parts, kind)
    if kind != "Flat":
        with pytest.raises(UserError, match="not a flat faiss index"):
            FlatIndex(paths, "hash")
        return
    index = FlatIndex(paths, "hash")
    oracle = faiss.read_index(str(tmp_path / "whole.index"))
    assert (index.count, index.size) == (oracle.ntotal, oracle.d)
    for start, stop in ((0, 50), (0, 1), (17, 31), (49, 50), (3, 3)):
        expected = oracle.reconstruct_n(start, stop - start) if stop > start else np.empty((0, 12))
        np.testing.assert_array_equal(index.rows(start, stop), expected)


def test_an_index_by_distance_has_the_same_vectors(tmp_path: Path, vectors: np.ndarray) -> None:
    index = faiss.IndexFlatL2(12)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "l2.index"))
    np.testing.assert_array_equal(FlatIndex([tmp_path / "l2.index"], "hash").rows(0, 50), vectors)


def test_parts_that_are_missing_cut_or_swapped(tmp_path: Path, vectors: np.ndarray) -> None:
    first, second, third = write_parts(tmp_path, vectors)
    with pytest.raises(UserError, match="is a part missing, or not whole"):
        FlatIndex([first, second], "hash")
    with pytest.raises(UserError, match="or not its first part"):
        FlatIndex([second, first, third], "hash")
    third.write_bytes(third.read_bytes()[:-4])
    with pytest.raises(UserError, match="2,441 bytes, but 50 vectors of 12 take 2,445"):
        FlatIndex([first, second, third], "hash")
    first.write_bytes(b"IxFI")
    with pytest.raises(UserError, match="not a flat faiss index"):
        FlatIndex([first], "hash")


def test_swapped_parts_after_the_first_are_seen_by_their_lengths(tmp_path: Path, vectors: np.ndarray) -> None:
    """Parts are cut anywhere, so numbers of two vectors are mixed."""
    first, second, third = write_parts(tmp_path, vectors)
    cut = second.read_bytes()
    second.write_bytes(third.read_bytes()[:6] + cut[6:])
    with pytest.raises(UserError, match=r"vector \d+ has length"):
        FlatIndex([first, second, third], "hash").rows(0, 50)
