"""The reproduction of several seeds: the paper's tables with our numbers, and the files that hold them."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import AVERAGE, rounded
from dgpo_core.reporting import paper
from dgpo_core.reporting.budget import Budgets
from dgpo_core.reporting.formats import GIVEN, as_json, write_texts
from dgpo_core.reporting.reproduction.claims import CLAIMS, PROFILED, Training
from dgpo_core.reporting.reproduction.power import power_rows
from dgpo_core.reporting.reproduction.render import markdown, page
from dgpo_core.reporting.reproduction.seeds import (
    RECORD,
    SeedResults,
    by_seed,
    combined,
    entry,
    pool,
    read_record,
    read_runs,
)
from dgpo_core.reporting.reproduction.verdicts import MEASUREMENT_LABELS, Judge, trainings

Table = dict[str, Any]


def tables(results: SeedResults, trained: Mapping[str, list[Training]], pair: str) -> Table:
    """Return the tables of tables.json. A cell has the mean, its interval, every seed and the paper."""
    sets = {**results.mirrors, AVERAGE: AVERAGE if all(results.mirrors.values()) else None}
    measurements = {name: name for name in MEASUREMENT_LABELS}
    exact_match = {model: _cells(results, model, sets, pair) for model in results.models}
    return {
        "seeds": results.seeds,
        "pair": pair,
        "mirrors": results.mirrors,
        "exact_match": exact_match,  # table 2
        "model_pairs": _model_pairs(exact_match, pair),
        "arcap": {model: _cells(results, model, measurements, pair) for model in results.models},  # table 5
        "ablations": _ablations(results, exact_match, pair),
        "power": power_rows(results),
        "stability": _stability(results, trained),
    }


def _cells(results: SeedResults, model: str, quantities: Mapping[str, str | None], pair: str) -> Table:
    """Return a model's cells; `quantities` are ours, each with the paper's name of it, if any."""
    return {
        name: entry(pool(samples), results.seeds, paper.paper_figure(pair, model, role) if role else None)
        for name, role in quantities.items()
        if (samples := results.of(model, name)) is not None
    }


def _model_pairs(exact_match: Table, pair: str) -> list[Table]:
    """Make table 3: average EM of student, teacher, PPO, KD and DGPO; ours only in the pair that was run."""
    return [
        {
            "pair": name,
            "model": model,
            "paper": paper.paper_figure(name, model, AVERAGE),
            "ours": exact_match.get(model, {}).get(AVERAGE) if name == pair else None,
        }
        for name in paper.paper_pairs()
        for model in PROFILED
    ]


def _ablations(results: SeedResults, exact_match: Table, pair: str) -> list[Table]:
    """Make table 6 with the variants of figure 6, each with its paired difference from DGPO."""
    figure = partial(paper.paper_figure, pair, quantity=AVERAGE)
    full, published = results.of("dgpo", AVERAGE), figure("dgpo")
    rows = []
    for row in paper.paper_ablations():
        recipe, difference = row["recipe"], None
        ours, theirs = results.of(recipe, AVERAGE), figure(recipe)
        if ours is not None and full is not None and recipe != "dgpo":
            known = None if theirs is None or published is None else theirs - published
            difference = entry(pool(combined([(1.0, ours), (-1.0, full)])), results.seeds, known)
        rows.append({**row, "exact_match": exact_match.get(recipe), "minus_dgpo": difference})
    return rows


def _stability(results: SeedResults, trained: Mapping[str, list[Training]]) -> Table:
    """Say how each recipe's training ended with each seed, beside what the paper says of it."""
    published, seeds = paper.paper_stability(), [str(seed) for seed in results.seeds]
    own = {name: dict(zip(seeds, map(vars, each), strict=True)) for name, each in trained.items()}
    return {
        recipe: {"seeds": rounded(own.get(recipe)), "paper": published.get(recipe)}
        for recipe in dict.fromkeys([*published, *results.models])
        if recipe not in GIVEN
    }


def pool_seeds(records: Iterable[Path], out: Path) -> dict[str, list[int]]:
    """Write tables.json, verdicts.json, results.md and index.html of these seeds' records into `out`.

    The report is about the models that all of them have; returned are the others, each with the seeds that
    lack it. A record's folder may be the root of a finished run. The same records give the same bytes.
    Raises UserError for none, and naming seed and file of what is missing, broken, there twice, or not
    comparable; then nothing is written.
    """
    read = {path: read_record(path) for path in records}
    if not read:
        raise UserError(f"no {RECORD} of a seed: nothing to report")
    roots, first = by_seed(read), next(iter(read.values()))
    paper.paper_exact_match(first.pair)  # an unknown pair is refused before any work
    everything = dict.fromkeys(model for record in read.values() for model in record.models)
    lacking = {m: [record.seed for record in read.values() if m not in record.models] for m in everything}
    models = [model for model, seeds in lacking.items() if not seeds]
    if not models:
        raise UserError(f"{', '.join(map(str, read))}: no model is in all of them")
    results = read_runs(roots, models, first)
    trained = trainings(results)
    found = tables(results, trained, first.pair) | {
        "parameters": first.parameters,
        "commits": {str(seed): read[path].commit for seed, path in sorted(roots.items())},
    }
    runs = [
        Budgets({recipe: own[place] for recipe, own in results.curves.items()}, first.starts)
        for place in range(len(results.seeds))
    ]
    judge = Judge(results, trained, {model: (first.pair, model) for model in models})
    verdicts = [judge.verdict(claim, first.pair) for claim in CLAIMS]
    texts = {
        "tables.json": as_json(found),
        "verdicts.json": as_json(verdicts),
        "results.md": markdown(found, verdicts),
        "index.html": page(found, verdicts, results.curves, runs),
    }
    write_texts(out, texts)
    return {model: seeds for model, seeds in lacking.items() if seeds}
