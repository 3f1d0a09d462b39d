"""Vectors of a published flat faiss index, read from its file or the parts it was split into.

The format is faiss's own (faiss/impl/index_write.cpp, IndexFlat): a header, then the vectors as float32, row
by row. Reading it here needs neither faiss nor the parts put together, nor wiki-18's 64 GB in memory.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dgpo_core.errors import UserError

# type, dimension, vectors, two unused numbers, trained, metric, number of floats that follow
HEADER = struct.Struct("<4siqqq?iQ")
FLAT = (b"IxFI", b"IxF2")  # by inner product, by L2 distance


class FlatIndex:
    """`count` vectors of `size` numbers; `digest` identifies the files' contents.

    Raises UserError for files that are not one whole flat index.
    """

    def __init__(self, parts: Sequence[Path], digest: str) -> None:
        self._parts, self.digest = list(parts), digest
        self._sizes = [part.stat().st_size for part in self._parts]
        name = ", ".join(map(str, self._parts))
        head = self._bytes(0, HEADER.size)
        if len(head) < HEADER.size or head[:4] not in FLAT:
            raise UserError(
                f"{name}: not a flat faiss index, or not its first part: it begins with {head[:4]!r}"
            )
        _, self.size, self.count, _, _, _, _, floats = HEADER.unpack(head)
        if floats != self.count * self.size or self.size <= 0:
            raise UserError(
                f"{name}: the header promises {self.count} vectors of {self.size} and {floats} numbers"
            )
        expected = HEADER.size + 4 * floats
        if sum(self._sizes) != expected:
            raise UserError(
                f"{name}: {sum(self._sizes):,} bytes, but {self.count:,} vectors of {self.size} take "
                f"{expected:,}; is a part missing, or not whole?"
            )

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """[stop - start, size], read from disk. Raises UserError for vectors that are not of length 1."""
        width = 4 * self.size
        data = self._bytes(HEADER.size + start * width, HEADER.size + stop * width)
        vectors = np.frombuffer(data, "<f4").reshape(stop - start, self.size)
        lengths = np.linalg.norm(vectors, axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) < 0.01))
        if len(wrong):
            raise UserError(
                f"{self._parts[0]}: vector {start + wrong[0]} has length {lengths[wrong[0]]:.3g}, not 1: "
                "it is not an index of normalised vectors, or its parts are in the wrong order"
            )
        return vectors

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the parts as if they were one file; fewer where it ends before."""
        pieces, offset = [], 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                with part.open("rb") as file:
                    file.seek(first)
                    pieces.append(file.read(last - first))
            offset += size
        return b"".join(pieces)
