"""A flat index as it is published: written by faiss, and split into parts."""

from pathlib import Path

import faiss
import numpy as np


def write_parts(folder: Path, vectors: np.ndarray, parts: int = 3, kind: str = "Flat") -> list[Path]:
    """`part_0` and so on, of about the same size: faiss's file of an inner-product index of `vectors`."""
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(vectors, np.float32))
    faiss.write_index(index, str(folder / "whole.index"))
    content = (folder / "whole.index").read_bytes()
    size = len(content) // parts + 1
    paths = [folder / f"part_{number}" for number in range(parts)]
    for number, path in enumerate(paths):
        path.write_bytes(content[number * size : (number + 1) * size])
    return paths
