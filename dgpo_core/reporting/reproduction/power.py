"""DGPO against every other recipe: with intervals, and with how many seeds and questions would show it."""

from typing import Any

import numpy as np

from dgpo_core.evaluation.power import Components, components
from dgpo_core.evaluation.results import AVERAGE, rounded
from dgpo_core.reporting.formats import GIVEN
from dgpo_core.reporting.reproduction.seeds import SeedResults, combined, entry, pool

SEEDS = (3, 5, 10, 20)  # of which power is told
QUESTIONS = sorted({int(count) for count in np.geomspace(100, 30_000, 24)})
# distillation alone, no gate, no guidance, the best variant
DRAWN = ("kd", "uniform_kl", "no_teacher", "best")
Row = dict[str, Any]


def power_rows(results: SeedResults) -> list[Row]:
    """Return a row for DGPO minus each other trained recipe: the difference, what makes it vary, and power.

    `needed` has the questions that show it with so many seeds (None: none are enough), `curves` the power
    over QUESTIONS. Empty with fewer than two seeds.
    """
    full, rows = results.of("dgpo", AVERAGE), []
    for model in results.models:
        other = results.of(model, AVERAGE)
        if full is None or other is None or model in (*GIVEN, "dgpo"):
            continue
        difference = combined([(1.0, full), (-1.0, other)])
        found = components([difference.only(name).values for name in results.mirrors])
        if found is None:
            continue
        rows.append(
            {
                "recipe": model,
                "difference": entry(pool(difference, signed=True), results.seeds, None),
                "variances": rounded({"a": found.seeds, "b": found.questions, "e": found.both}),
                "power": rounded(found.power(len(results.seeds), len(difference.keys))),
                "needed": {str(seeds): found.questions_needed(seeds) for seeds in SEEDS},
                "curves": _curves(found) if model in DRAWN else {},
            }
        )
    return rows


def _curves(found: Components) -> dict[str, list[float]]:
    return {str(seeds): rounded([found.power(seeds, count) for count in QUESTIONS]) for seeds in SEEDS}


def charts(rows: list[Row]) -> dict[str, Row]:
    """Return {id: {recipe, traces, log}}: power over the questions, a line for each number of seeds."""
    return {
        f"power-{row['recipe']}": {
            "recipe": row["recipe"],
            "log": True,
            "traces": [
                {"name": f"{seeds} seeds", "role": "trend", "colour": colour, "x": QUESTIONS, "y": values}
                for colour, (seeds, values) in enumerate(row["curves"].items(), 2)
            ],
        }
        for row in rows
        if row["curves"]
    }
