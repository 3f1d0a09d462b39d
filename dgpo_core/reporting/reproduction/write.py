"""From finished runs to the files of a reproduction."""

from collections.abc import Mapping
from pathlib import Path

from dgpo_core.reporting.files import as_json, write_texts
from dgpo_core.reporting.inputs import EVERY
from dgpo_core.reporting.paper import DEFAULT_PAIR
from dgpo_core.reporting.reproduction.claims import CLAIMS
from dgpo_core.reporting.reproduction.inputs import read_runs
from dgpo_core.reporting.reproduction.markdown import markdown
from dgpo_core.reporting.reproduction.page import render
from dgpo_core.reporting.reproduction.tables import tables
from dgpo_core.reporting.reproduction.verdicts import Judge, judge, of_contrasts, published, trainings


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
