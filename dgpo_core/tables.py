"""Parquet files, read in the calling thread."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

Only = tuple[str, Sequence[str]]  # rows in which this column has one of these values


def read_table(path: Path, columns: Sequence[str] | None = None, only: Only | None = None) -> pa.Table:
    """Read a file, or some of its columns or rows; of other rows no more than some are in memory at a time.

    Unlike `pyarrow.parquet.read_table`, which waits for ever where there is no memory for its threads.
    """
    with pq.ParquetFile(path) as file:
        names = list(columns or file.schema_arrow.names)
        if only is None:
            return file.read(names, use_threads=False).select(names)
        column, values = only[0], pa.array(only[1], pa.string())
        batches = file.iter_batches(1024, columns=[*{*names, column}], use_threads=False)
        kept = [batch.filter(pc.is_in(batch[column], values)).select(names) for batch in batches]
        return pa.Table.from_batches(kept, pa.schema([file.schema_arrow.field(name) for name in names]))
