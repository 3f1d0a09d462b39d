"""Draw docs/images/budget.svg from the seeds in results/tiny-full: `python docs/figures.py`."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot

from dgpo_core.reporting.budget import UNITS, Budgets, mean_looks
from dgpo_core.reporting.curves import read_curves
from dgpo_core.reporting.formats import model_label
from dgpo_core.reporting.reproduction.seeds import read_record

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/tiny-full"
PICTURE = ROOT / "docs/images/budget.svg"
RECIPES = ("kd_long", "kd", "dgpo", "best")


def budgets_of(seed: Path) -> Budgets:
    return Budgets({curve.recipe: curve for curve in read_curves(seed / "plots")}, read_record(seed).starts)


def draw(runs: list[Budgets]) -> None:
    """Draw validation EM over the budget: a thin line a seed, and a thick one of their mean."""
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "budget"
    figure, axes = pyplot.subplots(1, len(UNITS), figsize=(11, 4.5), layout="constrained", sharey=True)
    for axis, (measure, unit) in zip(axes, UNITS.items(), strict=True):
        for number, recipe in enumerate(RECIPES):
            for run in runs:
                looks = zip(*run.looks(recipe, measure), strict=True)
                axis.plot(*looks, color=f"C{number}", linewidth=0.6, alpha=0.5)
            mean = zip(*mean_looks(runs, recipe, measure), strict=True)
            axis.plot(*mean, color=f"C{number}", marker="o", markersize=4, label=model_label(recipe))
        axis.set(xlabel=unit, ylim=(0.25, None))
    axes[0].set(ylabel="EM on validation questions")
    axes[0].legend(loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw([budgets_of(seed) for seed in sorted(RECORDS.iterdir())])
