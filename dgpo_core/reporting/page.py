"""The page: everything that index.html needs as plain data, put into the template."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dgpo_core.reporting import paper, words
from dgpo_core.reporting.curves import Curve, figures
from dgpo_core.reporting.episodes import compact_json
from dgpo_core.reporting.results import AVERAGE

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = {"student": 0, "teacher": 1, "kd": 2, "dgpo": 3}  # of the style sheet; other models: 4 to 7
PIPELINE = ("data", "index", "teach", "filter", "distill", "reinforce", "evaluate")
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
    curves: list[Curve]
    questions: list[dict[str, Any]]  # of the episode reader
    metrics: dict[str, dict[str, Any]]
    params: dict[str, Any]
    pair: str  # of the paper's models


BEHAVIOUR_COLUMNS = (
    ("f1", "F1", "word overlap with the golden answer"),
    ("sub_em", "Sub-EM", "a golden answer is contained in the prediction"),
    ("hit", "Hit", "a golden answer is contained in a retrieved passage"),
    ("searches", "Searches", "answered queries an episode"),
    ("well_formed", "Valid format", "think, search, information, …, answer"),
    ("unanswered", "No answer", "episodes without a complete answer"),
    ("invalid", "Invalid action", "episodes with a turn that neither searches nor answers"),
    ("cut", "Cut", "episodes with a turn or a context cut by a limit"),
    ("model_tokens", "Tokens", "written by the model, an episode"),
)
ARCAP_GROUPS = (
    ("Source referencing", ("source_em_nq", "source_em_nq_thinking"), "nq"),
    ("Source referencing", ("source_em_musique", "source_em_musique_thinking"), "musique"),
    ("Query rewriting", ("query_hit_nq",), "nq"),
    ("Thinking", ("thinking_hit_nq", "thinking_searches_nq"), "nq"),
    ("Thinking", ("thinking_hit_musique", "thinking_searches_musique"), "musique"),
)


def render(report: Report) -> str:
    """The page's HTML: one file, no network, the same bytes for the same report."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    title, evidence = words.headline(report.comparisons, report.models)
    return environment.get_template("page.html.j2").render(
        title=title,
        evidence=evidence,
        verdicts=[
            (words.verdict(*item), words.evidence(item[1])) for item in list(report.comparisons.items())[1:]
        ],
        bars=_bars(report),
        failures=words.failures(report.results, AVERAGE),
        own_scale=any(name != mirrored for name, mirrored in report.mirrors.items()),
        pair=report.pair,
        exact_match=_exact_match(report),
        behaviour=_behaviour(report),
        arcap=_arcap(report),
        arcap_pair=paper.ARCAP_PAIR,
        stages=_stages(report),
        sampled=len(report.questions),
        metrics=[
            (stage, _flattened(values))
            for stage, values in sorted(report.metrics.items(), key=_pipeline_order)
        ],
        params=_flattened(report.params),
        # trusted text of our own, or JSON that compact_json made safe: everything else is escaped
        data=Markup(compact_json(_browser_data(report))),
        css=Markup(_text("page.css")),
        scripts=[Markup(get_plotlyjs()), Markup(_text("charts.js")), Markup(_text("reader.js"))],
    )


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _model(name: str, models: Sequence[str]) -> Row:
    others = [model for model in models if model not in COLOURS]
    colour = COLOURS[name] if name in COLOURS else 4 + others.index(name) % 4
    return {
        "name": name,
        "label": words.model_label(name),
        "colour": colour,
        "note": {"student": "before training", "teacher": "the model to learn from"}.get(name, "trained"),
    }


def _cell(
    mean: float | None, ci95: Sequence[float | None] | None, reference: float | None, digits: int
) -> Row:
    low, high = ci95 or (None, None)
    return {
        "value": DASH if mean is None else f"{mean:.{digits}f}",
        "interval": "" if low is None or high is None else f"{low:.{digits}f} {DASH} {high:.{digits}f}",
        "paper": "" if reference is None else f"{reference:.{digits}f}",
        "best": False,
    }


def _bars(report: Report) -> list[Row]:
    """Average EM of each model as a bar with its interval, in percent of a common scale."""
    averages = {model: report.results[model][AVERAGE] for model in report.models}
    top = max([0.1, *(value for row in averages.values() for value in (row["em"], row["ci95"][1]) if value)])
    bars = []
    for model, row in averages.items():
        low, high = (0.0 if bound is None else bound for bound in row["ci95"])
        bars.append(
            _model(model, report.models)
            | _cell(row["em"], row["ci95"], None, 3)
            | {
                "width": f"{100 * (row['em'] or 0) / top:.2f}",
                "start": f"{100 * low / top:.2f}",
                "span": f"{100 * (high - low) / top:.2f}",
            }
        )
    return bars


def _exact_match(report: Report) -> Row:
    figures_of = paper.paper_exact_match(report.pair)
    columns = [*report.mirrors.items(), (AVERAGE, "avg")]
    rows = [
        _model(model, report.models)
        | {
            "cells": [
                _cell(entry["em"], entry["ci95"], figures_of.get(model, {}).get(mirrored), 3)
                for name, mirrored in columns
                for entry in [report.results[model][name]]
            ]
        }
        for model in report.models
    ]
    for index, (name, _) in enumerate(columns):
        trained = [model for model in report.models if model not in words.GIVEN]
        known = [em for model in trained if (em := report.results[model][name]["em"]) is not None]
        for row in rows:
            em = report.results[row["name"]][name]["em"]
            row["cells"][index]["best"] = row["name"] in trained and em is not None and em == max(known)
    first = report.results[report.models[0]]
    heads = [
        {
            "name": name,
            "mirrors": words.PAPER_DATASETS.get(mirrored, mirrored),
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
            _cell(own[name]["mean"], own[name]["ci95"], None, _digits(name))
            for name, _, _ in BEHAVIOUR_COLUMNS
        ]
        rows.append(_model(model, report.models) | {"cells": cells})
    return {"heads": BEHAVIOUR_COLUMNS, "rows": rows}


def _digits(quantity: str) -> int:
    return 1 if quantity == "model_tokens" else 2 if "searches" in quantity else 3


def _arcap(report: Report) -> Row:
    reference = paper.paper_arcap() if report.pair == paper.ARCAP_PAIR else {}
    names = [name for _, group, _ in ARCAP_GROUPS for name in group]
    rows = []
    for model in report.models:
        own = report.arcap[model]
        cells = []
        for name in names:
            entry = own.get(name, {"mean": None, "ci95": None})
            figure = reference.get(model, {}).get(name)
            cells.append(_cell(entry["mean"], entry["ci95"], figure, _digits(name)))
        rows.append(_model(model, report.models) | {"cells": cells})
    groups = [
        {"title": title, "dataset": _playing(report, role), "span": len(group)}
        for title, group, role in ARCAP_GROUPS
    ]
    return {"groups": groups, "heads": [_kind(name) for name in names], "rows": rows}


def _kind(measurement: str) -> str:
    if "searches" in measurement:
        return "searches"
    if "hit" in measurement:
        return "hit"
    return "EM, with thinking" if measurement.endswith("thinking") else "EM, answer forced"


def _playing(report: Report, role: str) -> str:
    """The data set that plays a role of the paper's; the role itself where none does."""
    return next((name for name, mirrored in report.mirrors.items() if mirrored == role), role)


def _radar(report: Report, means: Mapping[str, Mapping[str, float | None]]) -> Row:
    """Axes (shares only: searches are counts) and one closed line a model, without unmeasured axes."""
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


def _pipeline_order(item: tuple[str, Any]) -> tuple[int, str]:
    stage = item[0].partition("-")[0].partition("_")[0]
    return (PIPELINE.index(stage) if stage in PIPELINE else len(PIPELINE), item[0])


def _stages(report: Report) -> list[Row]:
    return [
        {
            "title": words.STAGES.get(curve.stage, curve.stage),
            "recipe": words.model_label(curve.recipe),
            "figures": [
                {"id": f"curve-{index}-{number}", "title": figure["title"], "unit": figure["unit"]}
                for number, figure in enumerate(figures(curve))
            ],
        }
        for index, curve in enumerate(report.curves)
    ]


def _browser_data(report: Report) -> Row:
    charts = {
        f"curve-{index}-{number}": {"traces": figure["traces"], "model": curve.recipe}
        for index, curve in enumerate(report.curves)
        for number, figure in enumerate(figures(curve))
    }
    own = {
        model: {name: entry["mean"] for name, entry in entries.items()}
        for model, entries in report.arcap.items()
    }
    radars = {"radar-own": _radar(report, own)}
    if report.pair == paper.ARCAP_PAIR:
        published = paper.paper_arcap()
        radars["radar-paper"] = _radar(report, {name: published[name] for name in own if name in published})
    return {
        "models": [_model(name, report.models) for name in report.models],
        "sets": list(report.mirrors),
        "charts": charts,
        "radars": radars,
        "questions": report.questions,
    }


def _flattened(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, text) of every leaf, in order."""
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
