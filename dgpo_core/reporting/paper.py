"""What the paper says, to be shown beside ours: its tables of EM and ARCap, its trainings and its claims."""

import csv
from functools import cache
from pathlib import Path

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import AVERAGE, MEASUREMENTS

FOLDER = Path(__file__).parent / "paper"
DEFAULT_PAIR = "qwen2.5-3b-to-0.5b"
ARCAP_PAIR = DEFAULT_PAIR  # the only pair that the paper profiles


def paper_exact_match(pair: str = DEFAULT_PAIR) -> dict[str, dict[str, float]]:
    """Return {recipe: {the paper's data set or "avg": EM}}. Raises UserError for a pair that it lacks."""
    rows = [row for row in _rows("exact_match.csv") if row["pair"] == pair]
    if not rows:
        raise UserError(f"the paper has no pair {pair!r}; it has {', '.join(paper_pairs())}")
    return {row["recipe"]: _figures(row) for row in rows}


def paper_arcap() -> dict[str, dict[str, float]]:
    """Return {recipe: {measurement: figure}} of ARCAP_PAIR, without measurements that the paper lacks."""
    return {row["recipe"]: _figures(row) for row in _rows("arcap.csv")}


def paper_figure(pair: str, recipe: str, quantity: str) -> float | None:
    """Return EM (the average, or of a data set) or a measurement of ARCap; None where the paper lacks it."""
    if quantity in MEASUREMENTS:
        return paper_arcap().get(recipe, {}).get(quantity) if pair == ARCAP_PAIR else None
    return paper_exact_match(pair).get(recipe, {}).get("avg" if quantity == AVERAGE else quantity)


def paper_pairs() -> list[str]:
    """Return the pairs of models that the paper reports (table 3)."""
    return list(dict.fromkeys(row["pair"] for row in _rows("exact_match.csv")))


def paper_ablations() -> list[dict[str, str]]:
    """Return the rows of table 6 and the variants of figure 6, with their settings (table 10)."""
    return _rows("ablations.csv")


def paper_stability() -> dict[str, dict[str, str]]:
    """Return {recipe: {training: stable or collapses, step, quote, source}} of figures 4 and 6."""
    return {row["recipe"]: row for row in _rows("stability.csv")}


def paper_claims() -> list[dict[str, str]]:
    """Return the claims: group, claim, statement, source; `pair` where one is about this pair alone."""
    return _rows("claims.csv")


def _figures(row: dict[str, str]) -> dict[str, float]:
    return {name: float(text) for name, text in row.items() if name not in ("pair", "recipe")}


@cache
def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
