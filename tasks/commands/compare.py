"""`dgpo compare`: two evaluated models of the working tree, question by question."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dgpo_core.config.params import load_params
from dgpo_core.evaluation.comparison import compare as compare_models
from dgpo_core.reporting.formats import DASH, digits
from dgpo_core.reporting.search_use import NAMES
from tasks.project.paths import EVALUATION

Row = dict[str, Any]
NOTE = (
    "Means over the questions that failed for neither model. *: the 95 % interval of the difference leaves "
    "0 out. average: mean over the data sets. What the measurements are: docs/method.md."
)


def compare(first: str, second: str, as_json: bool = False) -> None:
    """Print EM, F1, ARCap and the use of search of two models with paired differences. Raises UserError."""
    params = load_params()
    found = compare_models(EVALUATION, first, second, list(params.questions.test), params.report.first)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    console.print(_table(found, first, second))
    console.print(NOTE)


def _table(found: Row, first: str, second: str) -> Table:
    table = Table(title=f"{first} - {second}, paired", title_justify="left")
    table.add_column("")
    for head in (first, second, "difference", "95 % interval", "", "n"):
        table.add_column(head, justify="right", no_wrap=True)
    for label, quantity in (("EM", found["em"]), ("F1", found["f1"])):
        rows = {**quantity["datasets"], "average": quantity["average"]}
        for name, row in rows.items():
            table.add_row(escape(f"{label} {name}"), *_cells(row, 3))
        table.add_section()
    for name, row in found["arcap"].items():
        table.add_row(name, *_cells(row, digits(name)))
    table.add_section()
    for name, row in found["search_use"].items():
        table.add_row(NAMES[name][0], *_cells(row, 3))
    return table


def _cells(row: Row, places: int) -> list[str]:
    low, high = row["ci95"]
    return [
        _number(row["first"], places),
        _number(row["second"], places),
        _number(row["difference"], places, "+"),
        DASH
        if low is None or high is None
        else f"{_number(low, places, '+')} to {_number(high, places, '+')}",
        "*" if row["excludes_zero"] else "",
        f"{row['n']:,}",
    ]


def _number(value: float | None, places: int, sign: str = "") -> str:
    # + 0.0: no "-0.000"
    return DASH if value is None else f"{round(value, places) + 0.0:{sign}.{places}f}"
