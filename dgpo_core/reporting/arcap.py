"""The page's sections about capabilities: ARCap's measurements, and what failed first in wrong episodes."""

from collections.abc import Mapping
from typing import Any

from dgpo_core.arcap.diagnosis import Failure
from dgpo_core.reporting import paper, words
from dgpo_core.reporting.inputs import MEASUREMENTS
from dgpo_core.reporting.parts import DASH, Report, Row, cell, digits, model_head

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
MINUS = "\N{MINUS SIGN}"
CHECK_COLUMNS = (
    ("without_evidence", "Answer without evidence", "of the correct answers: not all evidence retrieved"),
    ("repeats_question", "Question as query", "of the episodes with a search: a query is the question"),
    ("several_answers", "Several answers", "of the episodes: more than one <answer> opened"),
)


def table(report: Report) -> Row:
    """Each model's measurements, with the paper's figures."""
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


def differences(report: Report) -> list[Row]:
    """A row a pair of models: the paired differences of the same measurements."""
    return [
        {
            "label": f" {MINUS} ".join(words.model_label(name) for name in pair.split("-")),
            "cells": [_difference(entries.get(name, UNMEASURED), digits(name)) for name in MEASUREMENTS],
        }
        for pair, entries in report.arcap_comparisons.items()
    ]


def _difference(entry: Mapping[str, Any], places: int) -> Row:
    """A cell with signs; `best` marks an interval without 0."""
    mean, (low, high) = entry["mean"], entry["ci95"]
    known = low is not None and high is not None
    return {
        "value": DASH if mean is None else _signed(mean, places),
        "interval": f"{_signed(low, places)} to {_signed(high, places)}" if known else "",
        "paper": "",
        "best": known and (low > 0 or high < 0),
        "note": f"{entry['n']:,} paired questions",
    }


def _signed(value: float, places: int) -> str:
    rounded = round(value, places) + 0.0  # + 0.0: no "-0.0"
    return f"{rounded:{'+' if rounded else ''}.{places}f}".replace("-", MINUS)


def diagnosis(report: Report) -> Row:
    """Bars and a table of first failures, and the table of hacking checks."""
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
    """The names of failures and checks that the episode reader shows."""
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
    """The data set that plays a role of the paper's; the role itself where none does."""
    return next((name for name, mirrored in report.mirrors.items() if mirrored == role), role)


def radars(report: Report) -> dict[str, Row]:
    """This run's, and the paper's where the models are its."""
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
