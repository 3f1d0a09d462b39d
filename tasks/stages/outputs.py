"""Files that stages leave for people: JSON for `dvc metrics`, CSV for `dvc plots` and the report."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.project.paths import METRICS
from tasks.stages.stage import Run


def write_metrics(run: Run, metrics: Mapping[str, Any]) -> None:
    """Write the stage's metrics, rounded to six places, nan as null, and record the numbers with its run."""
    path = run.output(METRICS / f"{run.stage.replace('@', '-')}.json")
    rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
    rounded = {k: None if v != v else v for k, v in rounded.items()}  # JSON has no nan
    path.write_text(json.dumps(rounded, indent=2) + "\n")
    run.summary(metrics)


def write_curves(path: Path, rows: list[dict[str, float]]) -> None:
    """Write training curves; a column that a row lacks stays empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path, [columns, *([f"{row[c]:.6g}" if c in row else "" for c in columns] for row in rows)])


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table, the head first; what has a comma, a quote or a line break is quoted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
