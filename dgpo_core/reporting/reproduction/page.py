"""What the page draws: intervals on a common scale as percentages, and curves of several seeds as traces.

The page of a reproduction: the run's page's style and chart code, around several seeds and the paper.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting import formats as words
from dgpo_core.reporting.curves import Curve, Points, smoothed, thinned
from dgpo_core.reporting.episodes import compact_json
from dgpo_core.reporting.formats import COLOURS, DASH, colour_of, model_label
from dgpo_core.reporting.page import TEMPLATES
from dgpo_core.reporting.reproduction.claims import GROUPS, INVALID_RISE, LENGTH_DRIFT, NEAR_ZERO, PROFILED
from dgpo_core.reporting.reproduction.markdown import commits_text, given_text, seeds_text, stability_text
from dgpo_core.reporting.reproduction.verdicts import (
    BEFORE_COLLAPSE,
    MEASUREMENT_LABELS,
    REPRODUCED,
    VERDICTS,
    numbers_text,
    signed,
)

SHARE_LIMIT, COUNT_LIMIT = 0.3, 3.0  # differences beyond stand at the edge of their track
MAX_POINTS = 200  # a line; there are recipes x seeds x panels of them in one page
PANELS = (
    ("em", "Exact match", "sampled episodes"),
    ("dev_em", "Exact match, held out", "greedy episodes"),
    ("invalid_actions", "Invalid actions", "an episode"),
    ("response_tokens", "Response length", "model tokens"),
    ("searches", "Searches", "an episode"),
    ("entropy", "Entropy of the policy", "nats a token"),
    ("divergence", "Divergence from the teacher", "on-policy distillation, nats a token"),
    ("gate_open", "Gate open", "share of episodes"),
    ("gate_closed", "Gate closed", "share of episodes"),
    ("gate_excluded", "Excluded from the gate", "share of episodes, failed"),
    ("kl_inside", "KL inside the gate", "nats a token, at the sampling temperature"),
    ("kl_outside", "KL outside the gate", "nats a token, at the sampling temperature"),
    ("clip_fraction", "Clipped ratios", "share of tokens"),
    ("explained_variance", "Explained variance", "of the critic, at most 1"),
    ("reward", "Reward", "mean of an episode"),
    ("actor_grad_norm", "Actor: gradient norm", "before clipping"),
)
# who learns from the teacher's episodes is left out: the same columns mean something else there
SIGN_OF_SAMPLING = ("em", "reward")
Row = dict[str, Any]


def difference_track(entries: Sequence[tuple[Row | None, str]], counts: bool) -> Row:
    """Each entry's mean, interval, seeds and the paper's figure around zero, in percent of the track.

    The second of each pair is the mark's class in the style sheet: its colour.
    """
    limit = COUNT_LIMIT if counts else SHARE_LIMIT
    known = [(entry, colour) for entry, colour in entries if entry and entry["mean"] is not None]
    marks = [_mark(entry, -limit, limit) | {"class": colour} for entry, colour in known]
    return {"zero": "50.00", "marks": marks}


def level_track(entry: Row, top: float, colour: str) -> Row:
    """The same from zero to `top`."""
    known = [entry] if entry["mean"] is not None else []
    return {"zero": "0.00", "marks": [_mark(own, 0.0, top) | {"class": colour} for own in known]}


def top_of(entries: Iterable[Row | None]) -> float:
    values: list[float] = [
        value
        for entry in entries
        if entry
        for value in (entry["mean"], entry["ci95"][1], entry["paper"], *entry["seeds"].values())
        if value is not None
    ]
    return 1.02 * max([0.1, *values])


def _mark(entry: Row, start: float, end: float) -> Row:
    def place(value: float) -> str:
        return f"{100 * min(1.0, max(0.0, (value - start) / (end - start))):.2f}"

    low, high = entry["ci95"]
    return {
        "mean": place(entry["mean"]),
        "low": None if low is None else place(low),
        "width": None if low is None else f"{float(place(high)) - float(place(low)):.2f}",
        "seeds": [place(mean) for mean in entry["seeds"].values() if mean is not None],
        "paper": None if entry["paper"] is None else place(entry["paper"]),
    }


def panels(curves: dict[str, list[Curve]]) -> list[Row]:
    """{title, unit, traces} of each panel that has data: a thin line a seed, a strong one for the mean."""
    trained = {
        recipe: own
        for recipe, own in curves.items()
        if any(name in curve.columns for curve in own for name in SIGN_OF_SAMPLING)
    }
    found = []
    for column, title, unit in PANELS:
        traces = [trace for recipe, own in trained.items() for trace in _traces(recipe, own, column)]
        if traces:
            found.append({"title": title, "unit": unit, "traces": traces})
    return found


def _traces(recipe: str, curves: Sequence[Curve], column: str) -> list[Row]:
    seeds = [curve.columns[column] for curve in curves if column in curve.columns]
    if not seeds:
        return []
    lines = [("raw", points) for points in seeds] if len(seeds) > 1 else []
    return [
        {
            "name": model_label(recipe),
            "model": recipe,
            "role": role,
            "x": [round(step, 2) for step, _ in drawn],
            "y": [float(f"{value:.4g}") for _, value in drawn],
        }
        for role, points in [*lines, ("trend", mean_curve(seeds))]
        for drawn in [thinned(points if column == "dev_em" else smoothed(points), MAX_POINTS)]
    ]


def mean_curve(seeds: Sequence[Points]) -> Points:
    """Step by step over the seeds that have the step."""
    values: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            values[step].append(value)
    return [(step, sum(own) / len(own)) for step, own in sorted(values.items())]


HOLDS = {True: "correct", False: "wrong", None: "failed"}  # classes of the style sheet
CLASSES = dict(zip(VERDICTS, HOLDS.values(), strict=True))
SCRIPTS = ("theme.js", "charts.js", "reproduction.js")
# the curves of figures 4 and 6
FIGURES = ("ppo", "grpo", "dgpo", "dgpo_grpo", "no_cold_start", "gkd", "kd_gkd")


def render(tables: Row, verdicts: Sequence[Row], curves: dict[str, list[Curve]]) -> str:
    """The page's HTML: one file, no network, the same bytes for the same tables."""
    drawn = panels(curves)
    recipes = list(dict.fromkeys(trace["model"] for panel in drawn for trace in panel["traces"]))
    counts = Counter(row["verdict"] for row in verdicts)
    data = {
        "models": [_model(name, tables["exact_match"]) for name in tables["exact_match"]],
        "figures": [name for name in recipes if name in FIGURES],
        "charts": {f"curve-{index}": {"traces": panel["traces"]} for index, panel in enumerate(drawn)},
        "radars": {},
    }
    return _template("reproduction.html.j2").render(
        title=f"{counts[REPRODUCED]} of {len(verdicts)} claims reproduced at our scale",
        seeds=seeds_text(tables["seeds"]),
        counts=[(name, CLASSES[name], counts[name]) for name in VERDICTS],
        groups=_groups(verdicts),
        pair=tables["pair"],
        own_scale=any(name != role for name, role in tables["mirrors"].items()),
        bars_rows=_bars({model: own[AVERAGE] for model, own in tables["exact_match"].items()}),
        exact_match=_exact_match(tables),
        model_pairs=_model_pairs(tables),
        arcap=_arcap(tables),
        ablations=_ablations(tables),
        panels=drawn,
        recipes=[_model(name, tables["exact_match"]) for name in recipes],
        stability=_stability(tables),
        invalid_rise=INVALID_RISE,
        length_drift=LENGTH_DRIFT,
        near_zero=NEAR_ZERO,
        before_collapse=BEFORE_COLLAPSE,
        data=Markup(compact_json(data)),
        css=Markup(_text("page.css") + _text("reproduction.css")),
        scripts=[Markup(get_plotlyjs()), *(Markup(_text(name)) for name in SCRIPTS)],
    )


def render_sizes(found: Row) -> str:
    """The page of `sizes`: a card for each recipe, a bar for each pair of models."""
    top = top_of(entry for pair in found["pairs"] for entry in pair["exact_match"].values())
    seeds = ", ".join(map(str, found["seeds"])) or "none"
    return _template("sizes.html.j2").render(
        pairs=[_pair(pair, found["models"]) for pair in found["pairs"]],
        models=[words.model_label(model) for model in found["models"]],
        cards=[_size_card(_model(name, found["models"]), found["pairs"], top) for name in found["models"]],
        claims=[_claim(row) for row in found["verdicts"]],
        compared=f"On the seeds that all pairs ran: {seeds}.",
        css=Markup(_text("page.css") + _text("reproduction.css")),
        theme=Markup(_text("theme.js")),
    )


def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def _pair(pair: Row, models: Sequence[str]) -> Row:
    given = {role: given_text(pair, role) for role in words.GIVEN}
    cells = [_cell(pair["exact_match"].get(model)) for model in models]
    return pair | given | {"cells": cells, "code": commits_text(pair["commits"])}


def _size_card(model: Row, pairs: Sequence[Row], top: float) -> Row:
    name = model["name"]
    measured = [(pair, pair["exact_match"][name]) for pair in pairs if name in pair["exact_match"]]
    role = "teacher" if name == "teacher" else "student"
    bars = [
        {
            "label": f"{pair['profile']} · {given_text(pair, role)}",
            "colour": model["colour"],
            "track": level_track(entry, top, f"m{model['colour']}"),
            "cell": _cell(entry),
        }
        for pair, entry in measured
    ]
    return {"title": model["label"], "bars": bars}


def _text(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _model(name: str, models: Iterable[str] = ()) -> Row:
    """`models` are those of the report, where recipes that the paper does not have may be among them."""
    return {"name": name, "label": words.model_label(name), "colour": colour_of(name, models)}


def _groups(verdicts: Sequence[Row]) -> list[Row]:
    by_name = {row["claim"]: row for row in verdicts}
    return [
        {"title": title, "claims": [_claim(by_name[claim.name]) for claim in claims]}
        for title, claims in GROUPS
    ]


def _claim(row: Row) -> Row:
    tests = [_test(test) for test in row["tests"]]
    numbers = [(test["numbers"], HOLDS[test["holds"]]) for test in row["tests"] if test["numbers"]]
    counts = any("searches" in test["label"] for test in row["tests"])
    return row | {
        "class": CLASSES[row["verdict"]],
        "track": difference_track(numbers, counts) if numbers else None,
        "tests": tests if len(tests) > 1 else [],
    }


def _test(test: Row) -> Row:
    numbers = test["numbers"]
    return test | {
        "class": HOLDS[test["holds"]],
        "track": difference_track([(numbers, HOLDS[test["holds"]])], "searches" in test["label"])
        if numbers
        else None,
        "text": numbers_text(numbers) if numbers else test["evidence"],
    }


def _bars(entries: dict[str, Row]) -> list[Row]:
    top = top_of(entries.values())
    return [
        own | {"track": level_track(entry, top, f"m{own['colour']}"), "cell": _cell(entry)}
        for model, entry in entries.items()
        for own in [_model(model, entries)]
    ]


def _cell(entry: Row | None, digits: int = 3, sign: bool = False) -> Row:
    def form(value: float | None) -> str:
        return DASH if value is None else signed(value) if sign else f"{value:.{digits}f}"

    if entry is None:
        return {"value": "not run", "interval": "", "seeds": "", "paper": "", "best": False}
    low, high = entry["ci95"]
    return {
        "value": form(entry["mean"]),
        "interval": "" if low is None else f"{form(low)} {DASH if not sign else 'to'} {form(high)}",
        "seeds": " · ".join(form(mean) for mean in entry["seeds"].values()),
        "paper": "" if entry["paper"] is None else form(entry["paper"]),
        "best": False,
    }


def _exact_match(tables: Row) -> Row:
    names = [*tables["mirrors"], AVERAGE]
    rows = [
        _model(model, tables["exact_match"]) | {"cells": [_cell(own[name]) for name in names]}
        for model, own in tables["exact_match"].items()
    ]
    for index, name in enumerate(names):
        means = {model: own[name]["mean"] for model, own in tables["exact_match"].items()}
        known = [mean for model, mean in means.items() if model not in words.GIVEN and mean is not None]
        for row in rows:
            trained = row["name"] not in words.GIVEN and means[row["name"]] is not None
            row["cells"][index]["best"] = trained and means[row["name"]] == max(known)
    first = next(iter(tables["exact_match"].values()))
    heads = [(name, _plays(tables, name), first[name]["n"]) for name in names]
    return {"heads": heads, "rows": rows}


def _plays(tables: Row, name: str) -> str:
    if name == AVERAGE:
        return "over the sets"
    role = tables["mirrors"][name]
    return f"as {words.PAPER_DATASETS.get(role, role)}"


def _model_pairs(tables: Row) -> Row:
    pairs = list(dict.fromkeys(row["pair"] for row in tables["model_pairs"]))
    models = list(dict.fromkeys(row["model"] for row in tables["model_pairs"]))
    found = {(row["pair"], row["model"]): row for row in tables["model_pairs"]}
    rows = [
        _model(model)
        | {
            "cells": [
                _cell(found[pair, model]["ours"]) | {"paper": f"{found[pair, model]['paper']:.3f}"}
                for pair in pairs
            ]
        }
        for model in models
    ]
    return {"heads": pairs, "rows": rows}


def _arcap(tables: Row) -> Row:
    names = [name for name in MEASUREMENT_LABELS if any(name in own for own in tables["arcap"].values())]
    cards = [
        {
            "title": MEASUREMENT_LABELS[name],
            "bars": _bars({m: own[name] for m, own in tables["arcap"].items() if m in PROFILED}),
        }
        for name in names
    ]
    rows = [
        _model(model, tables["arcap"])
        | {"cells": [_cell(own[name], 2 if "searches" in name else 3) for name in names]}
        for model, own in tables["arcap"].items()
    ]
    return {"cards": cards, "heads": [MEASUREMENT_LABELS[name] for name in names], "rows": rows}


def _ablations(tables: Row) -> list[Row]:
    return [
        _model(row["recipe"])
        | row
        | {
            "average": _cell(row["exact_match"] and row["exact_match"][AVERAGE]),
            "difference": _cell(row["minus_dgpo"], sign=True) if row["recipe"] != "dgpo" else None,
            "track": difference_track([(row["minus_dgpo"], f"m{COLOURS[row['recipe']]}")], counts=False),
        }
        for row in tables["ablations"]
    ]


def _stability(tables: Row) -> list[Row]:
    return [
        _model(recipe, tables["exact_match"])
        | {
            "seeds": [stability_text({seed: state}) for seed, state in (own["seeds"] or {}).items()],
            "states": [state["state"] for state in (own["seeds"] or {}).values()],
            "paper": own["paper"],
        }
        for recipe, own in tables["stability"].items()
    ]
