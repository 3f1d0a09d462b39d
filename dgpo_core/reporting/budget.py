"""What trainings cost: episodes and processor time from the student on, and what EM they bought.

A recipe that starts from another one has its budget spent too. What all recipes share, the teacher's episodes
and distributions, is counted in none.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from dgpo_core.reporting.curves import Curve, Points
from dgpo_core.reporting.formats import DASH, Row, cell, comparison, comparison_numbers, model_label, signed

EPISODES, MINUTES = "episodes", "minutes"
UNITS = {EPISODES: "episodes", MINUTES: "processor minutes"}
PLACES = {EPISODES: 0, MINUTES: 1}  # decimal
METHOD, CONTROL = "dgpo", "kd_long"  # the control: distillation alone, with the method's budget
CONTROLLED = f"{METHOD}-{CONTROL}"  # the pair of them
GAP_LIMIT = 0.1  # of EM on training above EM on validation questions, beyond which it is said in words


@dataclass(frozen=True)
class Budgets:
    """The curves of a run's trainings, and the recipe (or the student) that each of them starts from."""

    curves: Mapping[str, Curve]
    starts: Mapping[str, str]

    @classmethod
    def of(cls, curves: Iterable[Curve], params: Mapping[str, Any]) -> "Budgets":
        """Take the starts from the recipes of the run's `params`."""
        groups = params.get("recipes", {}).values()
        starts = {name: row["start"] for group in groups for name, row in group.items()}
        return cls({curve.recipe: curve for curve in curves}, starts)

    def spent(self, recipe: str, measure: str) -> Points:
        """Return (step, what has been spent at its end) of a recipe; nothing where that is not known."""
        curve, before = self.curves.get(recipe), self.before(recipe, measure)
        if curve is None or before is None:
            return []
        if measure == MINUTES:
            return [(step, before + own / 60) for step, own in curve.columns.get("processor_seconds", [])]
        seen = curve.columns.get("episodes", [])
        totals = accumulate(count for _, count in seen)
        return [(step, before + total) for (step, _), total in zip(seen, totals, strict=True)]

    def before(self, recipe: str, measure: str) -> float | None:
        """Return what was spent before a recipe began: 0 where it starts from the student."""
        start = self.starts.get(recipe)
        return None if start is None else self.total(start, measure) if start in self.starts else 0.0

    def total(self, recipe: str, measure: str) -> float | None:
        """Return what a recipe's model has cost from the student on, or None where that is not known."""
        spent = self.spent(recipe, measure)
        return spent[-1][1] if spent else None

    def looks(self, recipe: str, measure: str) -> Points:
        """Return (budget, validation EM) of each look at the validation questions."""
        at = dict(self.spent(recipe, measure))
        looks = self.curves[recipe].columns.get("dev_em", []) if recipe in self.curves else []
        return [(at[step], em) for step, em in looks if step in at]


def mean_looks(runs: Sequence[Budgets], recipe: str, measure: str) -> Points:
    """Average the looks of several seeds' runs one by one, as far as all of them go."""
    looks = zip(*(budgets.looks(recipe, measure) for budgets in runs), strict=False)
    return [(fmean(x for x, _ in each), fmean(em for _, em in each)) for each in looks]


def figures(runs: Sequence[Budgets], models: Iterable[str]) -> dict[str, Row]:
    """Return {id: {title, traces}}: validation EM over the budget, a line a recipe, the mean of the runs."""
    found = {}
    for measure, unit in UNITS.items():
        traces = [
            {
                "name": model_label(model),
                "model": model,
                "role": "looks",
                "x": [round(spent, 3) for spent, _ in looks],
                "y": [round(em, 4) for _, em in looks],
            }
            for model in models
            if (looks := mean_looks(runs, model, measure))
        ]
        if traces:
            found[f"budget-{measure}"] = {"title": f"Validation EM over {unit}", "traces": traces}
    return found


def spent_text(budgets: Budgets, recipe: str) -> str:
    """Say what a model has cost: `7,956 episodes and 9.2 processor minutes`; empty where nothing is known."""
    known = [
        f"{total:,.{places}f} {UNITS[measure]}"
        for measure, places in PLACES.items()
        if (total := budgets.total(recipe, measure)) is not None
    ]
    return " and ".join(known)


def cost_cells(budgets: Budgets, recipe: str) -> list[Row]:
    """Return a cell a measure: what a model has cost, and what of it was its start's."""
    cells = []
    for measure, places in PLACES.items():
        total, before = budgets.total(recipe, measure), budgets.before(recipe, measure)
        start = f"{before:,.{places}f} in {model_label(budgets.starts[recipe])}" if total and before else ""
        value = DASH if total is None else f"{total:,.{places}f}"
        cells.append(cell(None, None, None, places) | {"value": value, "interval": start})
    return cells


def learnt_text(budgets: Budgets, models: Sequence[str]) -> str:
    """Say at what budget the method, or else the last trained model, learnt what it did."""
    model = METHOD if METHOD in models else models[-1]
    spent = spent_text(budgets, model)
    return f"{model_label(model)} has cost {spent}." if spent else ""


def control(budgets: Budgets, comparisons: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Say what distillation alone makes of the method's budget, with numbers, or that nobody has asked."""
    if CONTROLLED not in comparisons:
        missing = f"With {CONTROL} in compare, the report shows what KD makes of as many episodes."
        return "No control", missing
    entry, spent = comparisons[CONTROLLED], spent_text(budgets, CONTROL)
    cost = f". {model_label(CONTROL)} has cost {spent}." if spent else ""
    return comparison(CONTROLLED, entry), f"{comparison_numbers(entry)}{cost}"


def gap_text(gaps: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which models are better on the questions that they have learnt from."""
    wide = {model: own for model, own in gaps.items() if (own["gap"]["mean"] or 0.0) > GAP_LIMIT}
    if not wide:
        return "" if not gaps else f"No model is more than {GAP_LIMIT} better on its training questions."
    words = [
        f"{model_label(model)} by {own['gap']['mean']:.3f}{_interval(own['gap'])}"
        for model, own in wide.items()
    ]
    return (
        f"More than {GAP_LIMIT} better on training than on validation questions, so partly learnt by heart: "
        f"{', '.join(words)}."
    )


def _interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["ci95"]
    return "" if low is None else f" ({signed(low)} to {signed(high)})"
