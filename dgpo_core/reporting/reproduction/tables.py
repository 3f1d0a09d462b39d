"""The paper's tables with our numbers, as plain dictionaries ready for JSON.

From finished runs to the files of a reproduction.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgpo_core.evaluation.results import AVERAGE, EVERY, rounded
from dgpo_core.reporting import paper
from dgpo_core.reporting.formats import GIVEN, as_json, write_texts
from dgpo_core.reporting.paper import DEFAULT_PAIR
from dgpo_core.reporting.reproduction.claims import CLAIMS, Training
from dgpo_core.reporting.reproduction.markdown import markdown
from dgpo_core.reporting.reproduction.page import render
from dgpo_core.reporting.reproduction.pooling import Measured, combined, entry, pool, read_runs
from dgpo_core.reporting.reproduction.verdicts import (
    MEASUREMENT_LABELS,
    Judge,
    judge,
    of_contrasts,
    published,
    trainings,
)

Table = dict[str, Any]
PaperFigure = Callable[[str, str], float | None]


def tables(
    measured: Measured, paper_of: PaperFigure, trainings: dict[str, list[Training]], pair: str
) -> Table:
    """Everything that tables.json holds; each cell has the mean, its interval, every seed and the paper."""
    exact_match = {model: _exact_match(measured, paper_of, model) for model in measured.models}
    return {
        "seeds": measured.seeds,
        "pair": pair,
        "mirrors": measured.mirrors,
        "exact_match": exact_match,
        "model_pairs": _model_pairs(exact_match, pair),
        "arcap": {model: _arcap(measured, paper_of, model) for model in measured.models},
        "ablations": _ablations(measured, exact_match, paper_of),
        "stability": _stability(measured, trainings),
    }


def _exact_match(measured: Measured, paper_of: PaperFigure, model: str) -> Table:
    """Table 2: EM of each data set and their average."""
    names = {**measured.mirrors, AVERAGE: AVERAGE}
    return {
        name: entry(pool(samples), measured.seeds, paper_of(model, role))
        for name, role in names.items()
        if (samples := measured.of(model, name)) is not None
    }


def _model_pairs(exact_match: Table, pair: str) -> list[Table]:
    """Table 3: average EM of student, teacher, PPO, KD and DGPO; ours stand in the pair that was run only."""
    rows = []
    for name in paper.paper_pairs():
        published = paper.paper_exact_match(name)
        for model in ("student", "teacher", "ppo", "kd", "dgpo"):
            ours = exact_match.get(model, {}).get(AVERAGE) if name == pair else None
            rows.append({"pair": name, "model": model, "paper": published[model]["avg"], "ours": ours})
    return rows


def _arcap(measured: Measured, paper_of: PaperFigure, model: str) -> Table:
    """Table 5, and the same measurements where the paper leaves them out."""
    return {
        name: entry(pool(samples), measured.seeds, paper_of(model, name))
        for name in MEASUREMENT_LABELS
        if (samples := measured.of(model, name)) is not None
    }


def _ablations(measured: Measured, exact_match: Table, paper_of: PaperFigure) -> list[Table]:
    """Table 6 and the variants of figure 6, each with its paired difference from DGPO."""
    rows = []
    for row in paper.paper_ablations():
        recipe = row["recipe"]
        difference = None
        ours, full = measured.of(recipe, AVERAGE), measured.of("dgpo", AVERAGE)
        if ours is not None and full is not None and recipe != "dgpo":
            figures = (paper_of(recipe, AVERAGE), paper_of("dgpo", AVERAGE))
            published = None if None in figures else figures[0] - figures[1]  # type: ignore[operator]
            difference = entry(pool(combined([(1.0, ours), (-1.0, full)])), measured.seeds, published)
        rows.append({**row, "exact_match": exact_match.get(recipe), "minus_dgpo": difference})
    return rows


def _stability(measured: Measured, trainings: dict[str, list[Training]]) -> Table:
    """How each recipe's training ended with each seed, beside what the paper says of it."""
    published = paper.paper_stability()
    return {
        recipe: {
            "seeds": {
                str(seed): rounded(vars(training))
                for seed, training in zip(measured.seeds, trainings[recipe], strict=True)
            }
            if recipe in trainings
            else None,
            "paper": published.get(recipe),
        }
        for recipe in dict.fromkeys([*published, *measured.models])
        if recipe not in GIVEN
    }


def write_reproduction(
    runs: dict[int, Path],
    out: Path,
    models: list[str],
    mirrors: dict[str, str],
    pair: str = DEFAULT_PAIR,
    first: Mapping[str, int] = EVERY,
    parameters: Mapping[str, int] = EVERY,
    commits: Mapping[int, str] | None = None,
) -> None:
    """Write tables.json, verdicts.json, results.md and index.html into `out`.

    `runs` maps a seed to the root of its finished run (`evaluation/<model>/`, `plots/`); `models` and
    `mirrors` ({data set: the paper's that it stands for}) give the order of rows and columns; `pair` names
    the paper's models that the runs stand for; of the data sets in `first` only so many questions count;
    `parameters` are those of the given models, `commits` of the code that a seed ran. The same inputs give
    the same bytes.
    Raises UserError naming seed and file of what is missing, malformed or not the same questions; then
    nothing is written.
    """
    paper_of = published(pair)  # an unknown pair is refused before any work
    measured = read_runs(runs, models, mirrors, first)
    trained = trainings(measured)
    found = tables(measured, paper_of, trained, pair)
    found |= {"parameters": dict(parameters), "commits": {str(s): c for s, c in (commits or {}).items()}}
    bench = Judge(measured, of_contrasts(paper_of), trained)
    verdicts = [judge(bench, claim, pair) for claim in CLAIMS]
    texts = {
        "tables.json": as_json(found),
        "verdicts.json": as_json(verdicts),
        "results.md": markdown(found, verdicts),
        "index.html": render(found, verdicts, measured.curves),
    }
    write_texts(out, texts)
