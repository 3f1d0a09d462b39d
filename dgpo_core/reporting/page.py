"""The report of a run: its tables as JSON, and index.html, one page that needs nothing else."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dgpo_core.errors import UserError
from dgpo_core.evaluation import results
from dgpo_core.evaluation.diagnosis import Failure
from dgpo_core.evaluation.results import (
    AVERAGE,
    EVERY,
    MEASUREMENTS,
    read_arcap,
    read_diagnoses,
    read_metrics,
    read_scores,
)
from dgpo_core.evaluation.search_use_tables import read_search_use, search_use, search_use_comparisons
from dgpo_core.reporting import budget, paper
from dgpo_core.reporting.budget import Budgets
from dgpo_core.reporting.curves import Curve, figures, read_curves
from dgpo_core.reporting.episodes import compact_json, reader_data
from dgpo_core.reporting.formats import (
    DASH,
    GIVEN,
    MINUS,
    STAGES,
    Row,
    as_json,
    asset,
    cell,
    comparison,
    comparison_numbers,
    digits,
    failures,
    headline,
    model_head,
    model_label,
    own_scale,
    part_played,
    signed_cell,
    template,
    write_texts,
)
from dgpo_core.reporting.paper import DEFAULT_PAIR, paper_exact_match
from dgpo_core.reporting.search_use import BETTER, NAMES, search_use_differences, search_use_table

ARCAP_GROUPS = (  # in the order of MEASUREMENTS
    ("Source referencing", ("source_em_nq", "source_em_nq_thinking"), "nq"),
    ("Source referencing", ("source_em_musique", "source_em_musique_thinking"), "musique"),
    ("Query rewriting", ("query_hit_nq",), "nq"),
    ("Thinking", ("thinking_hit_nq", "thinking_searches_nq"), "nq"),
    ("Thinking", ("thinking_hit_musique", "thinking_searches_musique"), "musique"),
)
FAILURE_COLUMNS = (
    (Failure.NO_ACTION, "No action", "neither searched nor answered, or ended without doing so"),
    (Failure.STOPPED_EARLY, "Stopped early", "answered before searching for all the evidence"),
    (Failure.BAD_QUERY, "Bad query", "the query names nothing that is missing, or repeats an earlier one"),
    (Failure.EVIDENCE_NOT_FOUND, "Evidence not found", "though a sensible query asked for it"),
    (Failure.EVIDENCE_NOT_USED, "Evidence not used", "all of it was retrieved, the answer is another"),
    (Failure.ANSWER_FORMAT, "Answer format", "holds a golden answer, or cannot be read"),
)
UNMEASURED: Row = {"mean": None, "ci95": [None, None], "n": 0}
CHECK_COLUMNS = (
    ("without_evidence", "Answer without evidence", "of the correct answers: not all evidence retrieved"),
    ("repeats_question", "Question as query", "of the episodes with a search: a query is the question"),
    ("several_answers", "Several answers", "of the episodes: more than one <answer> opened"),
)
CAVEATS = 3  # named under the headline; the others are counted


@dataclass(frozen=True)
class Origin:
    """Where a run's figures are from: `facts` to tell runs apart by, and {setting: value} that was `changed`
    from its profile, None where that is not known."""

    facts: Sequence[str] = ()
    changed: Mapping[str, str] | None = None


UNKNOWN = Origin()


@dataclass(frozen=True)
class Report:
    """The tables of a run, as the JSON files hold them, and what the page shows beside them."""

    models: list[str]
    mirrors: dict[str, str | None]  # data set -> the paper's
    results: dict[str, Any]
    leaders: dict[str, str]  # data set -> the trained model that EM tells from all others
    behaviour: dict[str, Any]
    comparisons: dict[str, Any]
    arcap: dict[str, Any]
    arcap_comparisons: dict[str, Any]
    search_use: dict[str, Any]
    search_use_comparisons: dict[str, Any]
    diagnosis: dict[str, Any]
    hacking_comparisons: dict[str, Any]
    curves: list[Curve]
    budgets: Budgets
    gaps: dict[str, Any]  # of trained models: EM on training and on validation questions
    questions: list[dict[str, Any]]  # of the episode reader
    metrics: dict[str, dict[str, Any]]
    params: dict[str, Any]
    pair: str  # of the paper's models
    origin: Origin


@dataclass(frozen=True)
class Difference:
    """A measurement of two models, and their paired difference; `better` is 1 where more of it is, or -1."""

    name: str
    better: int
    ours: float
    theirs: float
    paired: Mapping[str, Any]

    @property
    def worse(self) -> bool:
        """Tell whether the whole interval of the difference is on the worse side of 0."""
        bounds = [self.better * bound for bound in self.paired["ci95"] if bound is not None]
        return bool(bounds) and max(bounds) < 0


def caveat(report: Report) -> tuple[str, str]:
    """Say in how many other measurements the headline's first model is worse, and name some.

    (words, evidence); the evidence is empty where there is none, and so are the words without a headline.
    """
    if not report.comparisons:
        return "", ""
    pair, entry = next(iter(report.comparisons.items()))
    first, second = map(model_label, pair.split("-"))
    measured = list(_differences(report, pair))
    worse = [difference for difference in measured if difference.worse]
    count = f"of {len(measured)} other measurements"
    if not worse:
        return f"{first} is worse than {second} in none {count}.", ""
    also = "Also" if (entry["ci95"][1] or 0) < 0 else "But"
    named = [f"{each.name} {each.ours:.3f} ({second} {each.theirs:.3f})" for each in worse[:CAVEATS]]
    more = [f"{len(worse) - CAVEATS} more below"] if len(worse) > CAVEATS else []
    return f"{also} {first} is worse in {len(worse)} {count}", "; ".join([*named, *more])


def _differences(report: Report, pair: str) -> Iterator[Difference]:
    """Give what two models were compared in beside their average EM."""
    first, second = pair.split("-")
    hacking = {model: report.diagnosis[model]["hacking"] for model in (first, second)}
    for name, label, _ in CHECK_COLUMNS:
        if paired := report.hacking_comparisons[pair].get(name):
            yield Difference(_plain(label), -1, *_means(hacking, name, first, second), paired)
    for name, paired in report.comparisons[pair]["datasets"].items():
        ours, theirs = (report.results[model][name]["em"] for model in (first, second))
        yield Difference(f"EM on {name}", 1, ours, theirs, paired)
    for title, group, role in ARCAP_GROUPS:
        for name in (name for name in group if "searches" not in name):
            if paired := report.arcap_comparisons[pair].get(name):
                label = f"{_plain(title)} ({_playing(report, role)}; {_kind(name)})"
                yield Difference(label, 1, *_means(report.arcap, name, first, second), paired)
    for name, better in BETTER.items():
        if paired := report.search_use_comparisons[pair].get(name):
            label = _plain(NAMES[name][0])
            yield Difference(label, better, *_means(report.search_use, name, first, second), paired)


def _means(tables: Mapping[str, Any], name: str, first: str, second: str) -> tuple[float, float]:
    return tables[first][name]["mean"], tables[second][name]["mean"]


def _plain(title: str) -> str:
    """Return a title as it is written within a sentence."""
    return title[0].lower() + title[1:].replace(": ", ", ")


def arcap_table(report: Report) -> Row:
    """Return each model's measurements of ARCap, with the paper's figures."""
    reference = paper.paper_arcap() if report.pair == paper.ARCAP_PAIR else {}
    rows = []
    for model in report.models:
        figures = reference.get(model, {})
        entries = [(name, report.arcap[model].get(name, UNMEASURED)) for name in MEASUREMENTS]
        cells = [cell(each["mean"], each["ci95"], figures.get(name), digits(name)) for name, each in entries]
        rows.append(model_head(model, report.models) | {"cells": cells})
    groups = [
        {"title": title, "dataset": _playing(report, role), "span": len(group)}
        for title, group, role in ARCAP_GROUPS
    ]
    return {"groups": groups, "heads": [_kind(name) for name in MEASUREMENTS], "rows": rows}


def arcap_differences(report: Report) -> list[Row]:
    """Return a row a pair of models: the paired differences of the same measurements."""
    return [
        {
            "label": f" {MINUS} ".join(model_label(name) for name in pair.split("-")),
            "cells": [signed_cell(entries.get(name, UNMEASURED), digits(name)) for name in MEASUREMENTS],
        }
        for pair, entries in report.arcap_comparisons.items()
    ]


def diagnosis(report: Report) -> Row:
    """Return bars and a table of first failures, and the table of hacking checks."""
    bars, failures, checks = [], [], []
    for model in report.models:
        head, own = model_head(model, report.models), report.diagnosis[model]
        shares = [own["first_failures"][name]["mean"] for name, _, _ in FAILURE_COLUMNS]
        parts = [
            {"width": f"{100 * share:.2f}", "title": f"{label} {share:.3f}", "index": index}
            for index, (share, (_, label, _)) in enumerate(zip(shares, FAILURE_COLUMNS, strict=True))
            if share
        ]
        wrong = None if None in shares else sum(shares)
        bars.append(head | {"parts": parts, "wrong": DASH if wrong is None else f"{wrong:.3f}"})
        failures.append(
            head | {"cells": [_share(own["first_failures"][name]) for name, _, _ in FAILURE_COLUMNS]}
        )
        checks.append(head | {"cells": [_share(own["hacking"][name]) for name, _, _ in CHECK_COLUMNS]})
    lost = sum(report.diagnosis[model]["failed"] for model in report.models)
    return {
        "bars": bars,
        "failures": {"heads": FAILURE_COLUMNS, "rows": failures},
        "checks": {"heads": CHECK_COLUMNS, "rows": checks},
        "failed": lost,
    }


def _share(entry: Mapping[str, Any]) -> Row:
    return cell(entry["mean"], entry["ci95"], None, 3) | {"note": f"{entry['n']:,} episodes"}


def labels() -> Row:
    """Return the names of failures and checks that the episode reader shows."""
    return {
        "failures": {str(name): label for name, label, _ in FAILURE_COLUMNS},
        "checks": {name: label for name, label, _ in CHECK_COLUMNS},
    }


def _kind(measurement: str) -> str:
    if "searches" in measurement:
        return "searches"
    if "hit" in measurement:
        return "hit"
    return "EM, with thinking" if measurement.endswith("thinking") else "EM, answer forced"


def _playing(report: Report, role: str) -> str:
    """Return the data set that plays a role of the paper's; the role itself where none does."""
    return next((name for name, mirrored in report.mirrors.items() if mirrored == role), role)


def radars(report: Report) -> dict[str, Row]:
    """Return the radar of this run, and the paper's where the models are its."""
    own = {
        model: {name: entry["mean"] for name, entry in entries.items()}
        for model, entries in report.arcap.items()
    }
    found = {"radar-own": _radar(report, own)}
    if report.pair == paper.ARCAP_PAIR:
        published = paper.paper_arcap()
        found["radar-paper"] = _radar(report, {name: published[name] for name in own if name in published})
    return found


def _radar(report: Report, means: Mapping[str, Mapping[str, float | None]]) -> Row:
    """Return the axes (shares only: searches are counts) and one closed line a model; no unmeasured axes."""
    axes = [
        (name, f"{title}<br>{_playing(report, role)}<br>{_kind(name)}")
        for title, group, role in ARCAP_GROUPS
        for name in group
        if "searches" not in name and any(own.get(name) is not None for own in means.values())
    ]
    lines = [
        {"model": model, "values": [own.get(name) for name, _ in axes]} for model, own in means.items() if own
    ]
    return {"axes": [label for _, label in axes], "lines": lines}


SCRIPTS = ("theme.js", "charts.js", "reader.js")
# as in dvc.yaml, which the stage does not read: DVC would not see that the report depends on it
PIPELINE = ("data", "index", "audit", "teach", "filter", "distributions", "distill", "reinforce", "evaluate")
BEHAVIOUR_COLUMNS = (
    ("f1", "F1", "word overlap with the golden answer"),
    ("sub_em", "Sub-EM", "a golden answer is contained in the prediction"),
    ("hit", "Hit", "a golden answer is contained in a retrieved passage"),
    ("searches", "Searches", "answered queries per episode"),
    ("well_formed", "Valid format", "think, search, information, …, answer"),
    ("unanswered", "No answer", "episodes without a complete answer"),
    ("invalid", "Invalid action", "episodes with a turn that neither searches nor answers"),
    ("cut", "Cut", "episodes with a turn or a context cut by a limit"),
    ("model_tokens", "Tokens", "written by the model, per episode"),
)


def render(report: Report) -> str:
    """Write the page: one file, no network, the same bytes for the same report."""
    title, evidence = headline(report.comparisons, report.models)
    return template("page.html.j2").render(
        title=title,
        evidence=evidence,
        origin=report.origin,
        caveat=caveat(report),
        verdicts=_verdicts(report),
        bars=_bars(report),
        costs=_costs(report),
        learnt=budget.learnt_text(report.budgets, report.models),
        gap=budget.gap_text(report.gaps),
        budget_figures=budget.figures([report.budgets], report.models),
        failures=failures(report.results, AVERAGE),
        own_scale=own_scale(report.mirrors),
        paper_sets=all(name == mirrored for name, mirrored in report.mirrors.items()),
        pair=report.pair,
        exact_match=_exact_match(report),
        behaviour=_behaviour(report),
        arcap=arcap_table(report) if any(report.arcap.values()) else None,
        arcap_differences=arcap_differences(report),
        arcap_pair=paper.ARCAP_PAIR,
        search_use=search_use_table(report.search_use),
        search_use_differences=search_use_differences(report.search_use_comparisons),
        diagnosis=diagnosis(report),
        stages=_stages(report),
        sampled=len(report.questions),
        metrics=[
            (stage, _flattened(values))
            for stage, values in sorted(report.metrics.items(), key=_pipeline_order)
        ],
        params=_flattened(report.params),
        # trusted text of our own, or JSON that compact_json made safe: everything else is escaped
        data=Markup(compact_json(_browser_data(report))),
        css=asset("page.css"),
        scripts=[Markup(get_plotlyjs()), *map(asset, SCRIPTS)],
    )


def _verdicts(report: Report) -> list[tuple[str, str]]:
    """Return what stands beside the headline: the control of DGPO, and the other pairs of models."""
    control = [budget.control(report.budgets, report.comparisons)] if budget.METHOD in report.models else []
    return control + [
        (comparison(pair, entry), comparison_numbers(entry))
        for pair, entry in list(report.comparisons.items())[1:]
        if pair != budget.CONTROLLED
    ]


def _bars(report: Report) -> list[Row]:
    """Return the average EM of each model as a bar with its interval, in percent of a common scale."""
    averages = {model: report.results[model][AVERAGE] for model in report.models}
    top = max([0.1, *(value for row in averages.values() for value in (row["em"], row["ci95"][1]) if value)])
    bars = []
    for model, row in averages.items():
        low, high = (0.0 if bound is None else bound for bound in row["ci95"])
        bars.append(
            model_head(model, report.models)
            | cell(row["em"], row["ci95"], None, 3)
            | {
                "width": f"{100 * (row['em'] or 0) / top:.2f}",
                "start": f"{100 * low / top:.2f}",
                "span": f"{100 * (high - low) / top:.2f}",
            }
        )
    return bars


def _costs(report: Report) -> list[Row]:
    """Return a row a trained model: its EM, what it has cost, and EM on training and validation questions."""
    rows = []
    for model in (name for name in report.models if name not in GIVEN):
        average, own = report.results[model][AVERAGE], report.gaps.get(model, {})
        known = [own.get(name, UNMEASURED) for name in (*results.SPLITS, "gap")]
        cells = [
            cell(average["em"], average["ci95"], None, 3),
            *budget.cost_cells(report.budgets, model),
            *(cell(entry["mean"], entry["ci95"], None, 3) for entry in known[:-1]),
            signed_cell(known[-1], 3) | {"best": False, "note": ""},
        ]
        rows.append(model_head(model, report.models) | {"cells": cells})
    return rows


def _exact_match(report: Report) -> Row:
    figures_of = paper.paper_exact_match(report.pair)
    # the paper's average is one over its own sets
    columns = [*report.mirrors.items(), (AVERAGE, "avg" if all(report.mirrors.values()) else None)]
    rows = [
        model_head(model, report.models)
        | {
            "cells": [
                cell(entry["em"], entry["ci95"], figures_of.get(model, {}).get(mirrored or ""), 3)
                for name, mirrored in columns
                for entry in [report.results[model][name]]
            ]
        }
        for model in report.models
    ]
    for index, (name, _) in enumerate(columns):
        for row in rows:
            row["cells"][index]["best"] = row["name"] == report.leaders.get(name)
    first = report.results[report.models[0]]
    heads = [
        {
            "name": name,
            "plays": "over the sets" if name == AVERAGE else part_played(mirrored),
            "questions": first[name]["n"] + first[name]["failed"],
        }
        for name, mirrored in columns
    ]
    return {"heads": heads, "rows": rows}


def _behaviour(report: Report) -> Row:
    rows = []
    for model in report.models:
        own = report.behaviour[model]
        cells = [
            cell(own[name]["mean"], own[name]["ci95"], None, digits(name)) for name, _, _ in BEHAVIOUR_COLUMNS
        ]
        rows.append(model_head(model, report.models) | {"cells": cells})
    return {"heads": BEHAVIOUR_COLUMNS, "rows": rows}


def _pipeline_order(item: tuple[str, Any]) -> tuple[int, str]:
    stage = item[0].partition("-")[0]
    return (PIPELINE.index(stage) if stage in PIPELINE else len(PIPELINE), item[0])


def _stages(report: Report) -> list[Row]:
    return [
        {
            "title": STAGES.get(curve.stage, curve.stage),
            "recipe": model_label(curve.recipe),
            "figures": [
                {"id": f"curve-{index}-{number}"} | {key: figure[key] for key in ("title", "unit", "first")}
                for number, figure in enumerate(figures(curve))
            ],
        }
        for index, curve in enumerate(report.curves)
    ]


def _browser_data(report: Report) -> Row:
    charts: Row = budget.figures([report.budgets], report.models)
    charts |= {
        f"curve-{index}-{number}": {"traces": figure["traces"], "model": curve.recipe}
        for index, curve in enumerate(report.curves)
        for number, figure in enumerate(figures(curve))
    }
    return {
        "models": [model_head(name, report.models) for name in report.models],
        "sets": list(report.mirrors),
        "charts": charts,
        "radars": radars(report),
        "labels": labels(),
        "questions": report.questions,
    }


def _flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted key, text) of every leaf, in order."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flattened(value, f"{name}.")
        elif isinstance(value, float):
            rows.append((name, f"{value:.6g}"))
        else:
            rows.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def write_report(
    evaluation: Path,
    plots: Path,
    metrics: Path,
    out: Path,
    models: list[str],
    mirrors: Mapping[str, str | None],
    params: dict[str, Any],
    pair: str = DEFAULT_PAIR,
    first: Mapping[str, int] = EVERY,
    origin: Origin = UNKNOWN,
) -> None:
    """Write results, arcap and search_use, with their comparisons, diagnosis and index.html into `out`.

    `models` and `mirrors` ({data set: the paper's that it stands for, if any}) give the order of rows and
    columns; `pair` names the paper's models whose figures stand beside ours; of the data sets in `first` only
    so many questions count; the page alone shows the `origin`. The same inputs give the same bytes.
    Raises UserError naming the file when an input is missing or malformed; then nothing is written.
    """
    if not models or not mirrors:
        raise UserError("a report needs at least one model and one data set")
    if results.AVERAGE in mirrors:
        raise UserError(f"no data set may be called {results.AVERAGE!r}: the results have that row already")
    paper_exact_match(pair)  # an unknown pair is refused before any work
    datasets = list(mirrors)
    scores = read_scores(evaluation, models, datasets, first)
    keys = scores[models[0]].keys
    curves = read_curves(plots)
    measured, diagnoses = read_arcap(evaluation, models), read_diagnoses(evaluation, models, keys)
    counted = read_search_use(evaluation, models, keys)
    report = Report(
        models=list(models),
        mirrors=dict(mirrors),
        results=results.results(scores, datasets),
        leaders=results.leaders({name: scores[name] for name in models if name not in GIVEN}, datasets),
        behaviour=results.behaviour(scores, datasets),
        comparisons=results.comparisons(scores),
        arcap=results.arcap(measured),
        arcap_comparisons=results.arcap_comparisons(measured),
        search_use=search_use(counted),
        search_use_comparisons=search_use_comparisons(counted),
        diagnosis=results.diagnosis(diagnoses, datasets),
        hacking_comparisons=results.hacking_comparisons(diagnoses),
        curves=[curve for curve in curves if curve.recipe in models],
        budgets=Budgets.of(curves, params),
        gaps=results.read_gaps(evaluation, models),
        questions=reader_data(evaluation, models, keys, diagnoses),
        metrics=read_metrics(metrics),
        params=dict(params),
        pair=pair,
        origin=origin,
    )
    texts = {
        "results.json": as_json(report.results),
        "comparisons.json": as_json(report.comparisons),
        "arcap.json": as_json(report.arcap),
        "arcap_comparisons.json": as_json(report.arcap_comparisons),
        "search_use.json": as_json(report.search_use),
        "search_use_comparisons.json": as_json(report.search_use_comparisons),
        "diagnosis.json": as_json(report.diagnosis),
        "index.html": render(report),
    }
    write_texts(out, texts)
