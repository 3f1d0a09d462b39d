"""The page: everything that index.html needs as plain data, put into the template."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dgpo_core.reporting import arcap, paper, words
from dgpo_core.reporting.curves import figures
from dgpo_core.reporting.episodes import compact_json
from dgpo_core.reporting.parts import Report, Row, cell, digits, model_head
from dgpo_core.reporting.results import AVERAGE

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("theme.js", "charts.js", "reader.js")
PIPELINE = ("data", "index", "teach", "filter", "distributions", "distill", "reinforce", "evaluate")


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
        arcap=arcap.table(report),
        arcap_differences=arcap.differences(report),
        arcap_pair=paper.ARCAP_PAIR,
        diagnosis=arcap.diagnosis(report),
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
        scripts=[Markup(get_plotlyjs()), *(Markup(_text(name)) for name in SCRIPTS)],
    )


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _bars(report: Report) -> list[Row]:
    """Average EM of each model as a bar with its interval, in percent of a common scale."""
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


def _exact_match(report: Report) -> Row:
    figures_of = paper.paper_exact_match(report.pair)
    columns = [*report.mirrors.items(), (AVERAGE, "avg")]
    rows = [
        model_head(model, report.models)
        | {
            "cells": [
                cell(entry["em"], entry["ci95"], figures_of.get(model, {}).get(mirrored), 3)
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
            cell(own[name]["mean"], own[name]["ci95"], None, digits(name)) for name, _, _ in BEHAVIOUR_COLUMNS
        ]
        rows.append(model_head(model, report.models) | {"cells": cells})
    return {"heads": BEHAVIOUR_COLUMNS, "rows": rows}


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
    return {
        "models": [model_head(name, report.models) for name in report.models],
        "sets": list(report.mirrors),
        "charts": charts,
        "radars": arcap.radars(report),
        "labels": arcap.labels(),
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
