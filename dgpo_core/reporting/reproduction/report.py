"""The reproduction of several seeds: the paper's tables with our numbers, and the files that hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import AVERAGE, EVERY, rounded
from dgpo_core.reporting import paper
from dgpo_core.reporting.formats import GIVEN, as_json, write_texts
from dgpo_core.reporting.paper import DEFAULT_PAIR
from dgpo_core.reporting.reproduction.claims import CLAIMS, Training
from dgpo_core.reporting.reproduction.render import markdown, page
from dgpo_core.reporting.reproduction.seeds import (
    RECORD,
    SeedRecord,
    SeedResults,
    combined,
    entry,
    pool,
    read_record,
    read_runs,
    require_comparable,
)
from dgpo_core.reporting.reproduction.verdicts import (
    MEASUREMENT_LABELS,
    Judge,
    of_contrasts,
    published,
    trainings,
)

Table = dict[str, Any]
PaperFigure = Callable[[str, str], float | None]


def tables(
    results: SeedResults, paper_of: PaperFigure, trainings: dict[str, list[Training]], pair: str
) -> Table:
    """Return the tables of tables.json. A cell has the mean, its interval, every seed and the paper."""
    exact_match = {model: _exact_match(results, paper_of, model) for model in results.models}
    return {
        "seeds": results.seeds,
        "pair": pair,
        "mirrors": results.mirrors,
        "exact_match": exact_match,
        "model_pairs": _model_pairs(exact_match, pair),
        "arcap": {model: _arcap(results, paper_of, model) for model in results.models},
        "ablations": _ablations(results, exact_match, paper_of),
        "stability": _stability(results, trainings),
    }


def _exact_match(results: SeedResults, paper_of: PaperFigure, model: str) -> Table:
    """Make table 2: EM of each data set and their average."""
    names = {**results.mirrors, AVERAGE: AVERAGE}
    return {
        name: entry(pool(samples), results.seeds, paper_of(model, role))
        for name, role in names.items()
        if (samples := results.of(model, name)) is not None
    }


def _model_pairs(exact_match: Table, pair: str) -> list[Table]:
    """Make table 3: average EM of student, teacher, PPO, KD and DGPO; ours only in the pair that was run."""
    rows = []
    for name in paper.paper_pairs():
        published = paper.paper_exact_match(name)
        for model in ("student", "teacher", "ppo", "kd", "dgpo"):
            ours = exact_match.get(model, {}).get(AVERAGE) if name == pair else None
            rows.append({"pair": name, "model": model, "paper": published[model]["avg"], "ours": ours})
    return rows


def _arcap(results: SeedResults, paper_of: PaperFigure, model: str) -> Table:
    """Make table 5, with the measurements that the paper leaves out."""
    return {
        name: entry(pool(samples), results.seeds, paper_of(model, name))
        for name in MEASUREMENT_LABELS
        if (samples := results.of(model, name)) is not None
    }


def _ablations(results: SeedResults, exact_match: Table, paper_of: PaperFigure) -> list[Table]:
    """Make table 6 with the variants of figure 6, each with its paired difference from DGPO."""
    rows = []
    for row in paper.paper_ablations():
        recipe = row["recipe"]
        difference = None
        ours, full = results.of(recipe, AVERAGE), results.of("dgpo", AVERAGE)
        if ours is not None and full is not None and recipe != "dgpo":
            figures = (paper_of(recipe, AVERAGE), paper_of("dgpo", AVERAGE))
            published = None if None in figures else figures[0] - figures[1]  # type: ignore[operator]
            difference = entry(pool(combined([(1.0, ours), (-1.0, full)])), results.seeds, published)
        rows.append({**row, "exact_match": exact_match.get(recipe), "minus_dgpo": difference})
    return rows


def _stability(results: SeedResults, trainings: dict[str, list[Training]]) -> Table:
    """Say how each recipe's training ended with each seed, beside what the paper says of it."""
    published = paper.paper_stability()
    return {
        recipe: {
            "seeds": {
                str(seed): rounded(vars(training))
                for seed, training in zip(results.seeds, trainings[recipe], strict=True)
            }
            if recipe in trainings
            else None,
            "paper": published.get(recipe),
        }
        for recipe in dict.fromkeys([*published, *results.models])
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
    results = read_runs(runs, models, mirrors, first)
    trained = trainings(results)
    found = tables(results, paper_of, trained, pair)
    found |= {"parameters": dict(parameters), "commits": {str(s): c for s, c in (commits or {}).items()}}
    judge = Judge(results, of_contrasts(paper_of), trained)
    verdicts = [judge.verdict(claim, pair) for claim in CLAIMS]
    texts = {
        "tables.json": as_json(found),
        "verdicts.json": as_json(verdicts),
        "results.md": markdown(found, verdicts),
        "index.html": page(found, verdicts, results.curves),
    }
    write_texts(out, texts)


@dataclass(frozen=True)
class Scope:
    """What a report of several seeds is about. `left_out`: the models that not every seed has, each with the
    seeds that lack it."""

    profile: str
    models: list[str]
    left_out: dict[str, list[int]]


def pool_seeds(records: list[Path], out: Path) -> Scope:
    """Write the report of these seeds' records into `out`, on the models that all of them have.

    Raises UserError for none, a broken one, a seed that is there twice, and seeds that cannot be compared.
    """
    if not records:
        raise UserError(f"no {RECORD} of a seed: nothing to report")
    read = {path: read_record(path) for path in records}
    first = require_comparable(list(read.items()))
    roots: dict[int, Path] = {}
    for path, record in read.items():
        if record.seed in roots:
            raise UserError(f"{path / RECORD}: seed {record.seed} is in {roots[record.seed]} too")
        roots[record.seed] = path
    scope = _scope(list(read.values()))
    if not scope.models:
        raise UserError(f"{', '.join(map(str, records))}: no model is in all of them")
    commits = {record.seed: record.commit for record in read.values()}
    write_reproduction(
        roots, out, scope.models, first.mirrors, first.pair, first.first, first.parameters, commits
    )
    return scope


def _scope(records: list[SeedRecord]) -> Scope:
    everything = dict.fromkeys(model for record in records for model in record.models)
    lacking = {m: [record.seed for record in records if m not in record.models] for m in everything}
    models = [model for model, seeds in lacking.items() if not seeds]
    return Scope(records[0].profile, models, {model: seeds for model, seeds in lacking.items() if seeds})
