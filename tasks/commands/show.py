"""Print the results: `dgpo show [reports/results.json]`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dgpo_core.errors import UserError
from dgpo_core.files import parsed_json
from dgpo_core.text import markdown_cell
from tasks.project.paths import METRICS

RESULTS = Path("reports/results.json")
AVERAGE = "average"

Results = dict[str, dict[str, dict[str, Any]]]


def load_results(path: Path) -> Results:
    """Read {model: {data set: {"em", "f1", "sub_em", "n", "ci95"}}}. Raises UserError."""
    try:
        results = parsed_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no results yet; {_way_to_results()}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    cells = [cell for sets in _values(results) for cell in _values(sets)]
    if not cells or not all(isinstance(cell, dict) and "em" in cell for cell in cells):
        raise UserError(f'{path}: expected {{model: {{data set: {{"em": ...}}}}}}')
    loaded: Results = results
    return loaded


def _way_to_results() -> str:
    """Say what makes the table: the whole pipeline, or the models that have been evaluated already."""
    prefix = "evaluate-"
    if models := sorted(path.stem.removeprefix(prefix) for path in METRICS.glob(f"{prefix}*.json")):
        names = ", ".join(models)
        return f"of {names} alone: `compare: [{names}]` in params.yaml, then `python -m tasks.stages.report`"
    return "run the pipeline first (`make demo`)"


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return column names, and a row per data set: EM of each model with its 95 % interval, average last."""
    names = {name: None for sets in results.values() for name in sets}  # in order of appearance
    ordered = [name for name in names if name != AVERAGE] + ([AVERAGE] if AVERAGE in names else [])
    table = [
        [name, *(_cell(sets[name]) if name in sets else "-" for sets in results.values())] for name in ordered
    ]
    return ["EM", *results], table


def markdown(results: Results) -> str:
    """Return the table as Markdown."""
    header, table = rows(results)
    lines = [header, ["---"] * len(header), *table]
    return "\n".join(f"| {' | '.join(map(markdown_cell, line))} |" for line in lines)


def show(path: Path = RESULTS) -> None:
    header, body = rows(load_results(path))
    table = Table(title="Exact match (95 % confidence interval)")
    for index, name in enumerate(header):
        table.add_column(escape(name) if index else "", justify="right" if index else "left")
    for row in body:
        table.add_row(*map(escape, row))
    Console().print(table)


def _cell(scores: dict[str, Any]) -> str:
    if scores["em"] is None:
        return "-"  # every question failed
    interval = [bound for bound in scores.get("ci95") or [] if bound is not None]
    return f"{scores['em']:.3f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if len(interval) == 2 else "")


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [None]
