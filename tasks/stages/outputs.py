"""Files that stages leave for people: JSON for `dvc metrics`, CSV for `dvc plots` and the report."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write metrics as JSON, rounded to six places; what is not a number becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
    rounded = {k: None if v != v else v for k, v in rounded.items()}  # JSON has no nan
    path.write_text(json.dumps(rounded, indent=2) + "\n")


def write_curves(path: Path, rows: list[dict[str, float]]) -> None:
    """Write training curves; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path, [columns, *([f"{row[c]:.6g}" if c in row else "" for c in columns] for row in rows)])


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, the head first; what has a comma, a quote or a line break is quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
