"""What every section of the page is made of: the report's tables, and heads and cells of its rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo_core.reporting import words
from dgpo_core.reporting.curves import Curve

COLOURS = {name: index for index, name in enumerate(words.MODEL_LABELS)}  # of the style sheet
DASH = "\N{EN DASH}"
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """The tables of a run, as the JSON files hold them, and what surrounds them."""

    models: list[str]
    mirrors: dict[str, str]  # data set -> the paper's
    results: dict[str, Any]
    behaviour: dict[str, Any]
    comparisons: dict[str, Any]
    arcap: dict[str, Any]
    arcap_comparisons: dict[str, Any]
    diagnosis: dict[str, Any]
    curves: list[Curve]
    questions: list[dict[str, Any]]  # of the episode reader
    metrics: dict[str, dict[str, Any]]
    params: dict[str, Any]
    pair: str  # of the paper's models


def colour_of(name: str, models: Iterable[str]) -> int:
    """A recipe of the user's takes the colour of one of the paper's, which is seldom beside it."""
    if name in COLOURS:
        return COLOURS[name]
    others = [model for model in models if model not in COLOURS]
    return 4 + others.index(name) % (len(COLOURS) - 4)


def model_head(name: str, models: Sequence[str]) -> Row:
    """A model's name, label, colour and note."""
    return {
        "name": name,
        "label": words.model_label(name),
        "colour": colour_of(name, models),
        "note": {"student": "before training", "teacher": "the model to learn from"}.get(name, "trained"),
    }


def cell(
    mean: float | None, ci95: Sequence[float | None] | None, reference: float | None, places: int
) -> Row:
    """A table's cell as texts; `reference` is the paper's figure, `note` appears on pointing at it."""
    low, high = ci95 or (None, None)
    return {
        "value": DASH if mean is None else f"{mean:.{places}f}",
        "interval": "" if low is None or high is None else f"{low:.{places}f} {DASH} {high:.{places}f}",
        "paper": "" if reference is None else f"{reference:.{places}f}",
        "best": False,
        "note": "",
    }


def digits(quantity: str) -> int:
    """Decimal places: fewer for counts than for shares."""
    return 1 if quantity == "model_tokens" else 2 if "searches" in quantity else 3
