"""What the page draws: intervals on a common scale as percentages, and curves of several seeds as traces."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from dgpo_core.reporting.curves import Curve, Points, smoothed, thinned
from dgpo_core.reporting.words import model_label

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
