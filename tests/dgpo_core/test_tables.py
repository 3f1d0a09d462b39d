"""Parquet files: pyarrow's own reader is the oracle."""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dgpo_core.tables import read_table
from tests.conftest import run_python

TABLE = pa.table(
    {"id": [f"q{i % 50}" for i in range(3000)], "em": range(3000), "owners": [[i] for i in range(3000)]}
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    pq.write_table(TABLE, tmp_path / "table.parquet", row_group_size=700)
    return tmp_path / "table.parquet"


def test_columns_and_rows_are_those_that_pyarrow_reads(path: Path) -> None:
    assert read_table(path).equals(pq.read_table(path))
    assert read_table(path, ["owners", "id"]).equals(pq.read_table(path, columns=["owners", "id"]))
    few = read_table(path, ["em"], ("id", ["q7", "q49", "none"]))
    assert few.equals(pq.read_table(path, columns=["em"], filters=[("id", "in", ["q7", "q49"])]))
    assert few.num_rows == 120 and read_table(path, ["em"], ("id", [])).num_rows == 0


LIMITED = """
import resource, sys
from pathlib import Path
from dgpo_core.tables import read_table
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {room},) * 2)
read_table(Path({path!r}), ["em"], {only})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
@pytest.mark.parametrize("only", [None, ("id", ["q7"])])
def test_without_memory_it_ends(path: Path, only: tuple[str, list[str]] | None) -> None:
    """Where `pyarrow.parquet.read_table` hangs."""
    codes = [
        run_python(LIMITED.format(room=room, path=str(path), only=only)).returncode
        for room in (0, 4 << 20, 256 << 20)
    ]
    assert codes[-1] == 0
