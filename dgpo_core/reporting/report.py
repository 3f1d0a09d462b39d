"""From the folders of a run to its report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.reporting import results as tables
from dgpo_core.reporting.curves import read_curves
from dgpo_core.reporting.episodes import reader_data
from dgpo_core.reporting.files import as_json, write_texts
from dgpo_core.reporting.inputs import EVERY, read_arcap, read_diagnoses, read_metrics, read_scores
from dgpo_core.reporting.page import render
from dgpo_core.reporting.paper import DEFAULT_PAIR, paper_exact_match
from dgpo_core.reporting.parts import Report


def write_report(
    evaluation: Path,
    plots: Path,
    metrics: Path,
    out: Path,
    models: list[str],
    mirrors: dict[str, str],
    params: dict[str, Any],
    pair: str = DEFAULT_PAIR,
    first: Mapping[str, int] = EVERY,
) -> None:
    """Write results, comparisons, arcap, arcap_comparisons and diagnosis (JSON) and index.html into `out`.

    `models` and `mirrors` ({data set: the paper's that it stands for}) give the order of rows and columns;
    `pair` names the paper's models whose figures stand beside ours; of the data sets in `first` only so many
    questions count. The same inputs give the same bytes.
    Raises UserError naming the file when an input is missing or malformed; then nothing is written.
    """
    if not models or not mirrors:
        raise UserError("a report needs at least one model and one data set")
    if tables.AVERAGE in mirrors:
        raise UserError(f"no data set may be called {tables.AVERAGE!r}: the results have that row already")
    paper_exact_match(pair)  # an unknown pair is refused before any work
    datasets = list(mirrors)
    scores = read_scores(evaluation, models, datasets, first)
    keys = scores[models[0]].keys
    measured, diagnoses = read_arcap(evaluation, models), read_diagnoses(evaluation, models, keys)
    report = Report(
        models=list(models),
        mirrors=dict(mirrors),
        results=tables.results(scores, datasets),
        behaviour=tables.behaviour(scores, datasets),
        comparisons=tables.comparisons(scores),
        arcap=tables.arcap(measured),
        arcap_comparisons=tables.arcap_comparisons(measured),
        diagnosis=tables.diagnosis(diagnoses, datasets),
        curves=[curve for curve in read_curves(plots) if curve.recipe in models],
        questions=reader_data(evaluation, models, keys, diagnoses),
        metrics=read_metrics(metrics),
        params=dict(params),
        pair=pair,
    )
    texts = {
        "results.json": as_json(report.results),
        "comparisons.json": as_json(report.comparisons),
        "arcap.json": as_json(report.arcap),
        "arcap_comparisons.json": as_json(report.arcap_comparisons),
        "diagnosis.json": as_json(report.diagnosis),
        "index.html": render(report),
    }
    write_texts(out, texts)
