"""Training curves: the tables of the training stages as small multiples for plotly."""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_core.errors import UserError
from dgpo_core.reporting.formats import model_label

MAX_POINTS = 1000  # denser columns are averaged in blocks, for the size of the page
SMOOTHING = 20  # a trend is the mean over 1/SMOOTHING of the curve, drawn where the curve is long enough


@dataclass(frozen=True)
class Panel:
    """One small plot: its title, the unit of its y axis, and the columns drawn in it.

    The `first` ones are shown at once, the others on demand.
    """

    title: str
    unit: str
    columns: tuple[str, ...]
    first: bool = False


# not comparable with a distillation's divergence, which is at temperature 1
KL_UNIT = "nats per token, to the reference, at the sampling temperature"
PANELS = (
    Panel("Exact match", "share of episodes", ("em", "dev_em"), first=True),
    Panel("Reward", "mean per episode", ("reward",), first=True),
    Panel("Loss", "nats per token", ("loss",), first=True),
    Panel("KL divergence, gated", KL_UNIT, ("kl_inside",), first=True),
    Panel("Response length", "model tokens per episode", ("response_tokens",), first=True),
    Panel("Entropy of the policy", "nats per token", ("entropy",), first=True),
    Panel("Step without a reward", "1 where no episode is correct", ("unrewarded",)),
    Panel("Cross-entropy", "nats per token", ("ce",)),
    Panel("Divergence from the teacher", "nats per token, as the objective measures it", ("divergence",)),
    Panel("KL divergence, not gated", f"{KL_UNIT}, of a sample", ("kl_outside",)),
    Panel("Gate open", "share of episodes", ("gate_open",)),
    Panel("Gate closed", "share of episodes", ("gate_closed",)),
    Panel("Excluded from the gate", "share of episodes, failed", ("gate_excluded",)),
    Panel("Searches", "per episode", ("searches",)),
    Panel("Invalid actions", "per episode", ("invalid_actions",)),
    Panel("Clipped ratios", "share of tokens", ("clip_fraction",)),
    Panel("Explained variance", "at most 1", ("explained_variance",)),
    Panel("Golden answer retrieved", "share of episodes", ("hit",)),
    Panel("Valid format", "share of episodes", ("well_formed",)),
    Panel("Without an answer", "share of episodes", ("no_answer",)),
    Panel("Policy loss", "per token", ("policy_loss",)),
    Panel("Value loss", "per token", ("value_loss",)),
    Panel("Change of the policy", "nats per token, approximate KL", ("approx_kl",)),
    Panel("Validation loss", "nats per token", ("validation_loss",)),
    Panel("Teacher's share of the target", "TAID's t", ("taid_t",)),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("Gradient norm", "before clipping", ("grad_norm",)),
    Panel("Actor: gradient norm", "before clipping", ("actor_grad_norm",)),
    Panel("Critic: gradient norm", "before clipping", ("critic_grad_norm",)),
)
PROCESSOR_TIME = "processor_time"  # folder beside the curves
BUDGET = ("episodes", "processor_seconds")  # what steps cost: shown in the figures of the budget
SEED_POINTS = 200  # a line; there are recipes x seeds x panels of them in a reproduction's page
SEED_PANELS = (
    ("em", "Exact match", "sampled episodes"),
    ("dev_em", "Exact match, held out", "greedy episodes"),
    ("invalid_actions", "Invalid actions", "per episode"),
    ("response_tokens", "Response length", "model tokens per episode"),
    ("searches", "Searches", "per episode"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("divergence", "Divergence from the teacher", "on-policy distillation, nats per token"),
    ("gate_open", "Gate open", "share of episodes"),
    ("gate_closed", "Gate closed", "share of episodes"),
    ("gate_excluded", "Excluded from the gate", "share of episodes, failed"),
    ("kl_inside", "KL inside the gate", "nats per token, at the sampling temperature"),
    ("kl_outside", "KL outside the gate", "nats per token, at the sampling temperature"),
    ("clip_fraction", "Clipped ratios", "share of tokens"),
    ("explained_variance", "Explained variance", "of the critic, at most 1"),
    ("reward", "Reward", "mean per episode"),
    ("actor_grad_norm", "Actor: gradient norm", "before clipping"),
)
# who learns from the teacher's episodes is left out: the same columns mean something else there
SIGN_OF_SAMPLING = ("em", "reward")
COLUMN_LABELS = {"em": "training (sampled)", "dev_em": "held out"}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One table of a training stage; each column's points are (step, value), gaps left out."""

    stage: str  # distill, reinforce, ...
    recipe: str
    columns: dict[str, Points]


def read_curves(folder: Path) -> list[Curve]:
    """Read every `<stage>-<recipe>.csv`, by name. Raises UserError naming file and line."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return [_read(path) for path in sorted(folder.glob("*.csv"))]


def _read(path: Path) -> Curve:
    """Read a curve, and beside its columns the processor seconds of its steps, where they were kept."""
    stage, _, recipe = path.stem.partition("-")
    timed = path.parent / PROCESSOR_TIME / path.name
    return Curve(stage, recipe, _columns(path) | (_columns(timed) if timed.is_file() else {}))


def _columns(path: Path) -> dict[str, Points]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        if "step" not in names:
            raise UserError(f"{path}: a curve needs a column step")
        columns: dict[str, Points] = {name: [] for name in names if name != "step"}
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: not {len(names)} values")
            step = _number(row["step"], where)
            if step is None:
                raise UserError(f"{where}: no step")
            for name, points in columns.items():
                if (value := _number(row[name], where)) is not None:
                    points.append((step, value))
    return {name: points for name, points in columns.items() if points}


def _number(text: str, where: str) -> float | None:
    """Return None for an empty field and for what cannot be drawn (nan, infinities)."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is no number") from error
    return value if math.isfinite(value) else None


def figures(curve: Curve) -> list[dict[str, Any]]:
    """Return {title, unit, first, traces} of each panel: columns in PANELS' order, then the others."""
    known = {*BUDGET, *(column for panel in PANELS for column in panel.columns)}
    others = [Panel(name, "", (name,)) for name in curve.columns if name not in known]
    found = []
    for panel in [*PANELS, *others]:
        drawn = [name for name in panel.columns if name in curve.columns]
        traces = [trace for name in drawn for trace in _traces(name, curve.columns[name])]
        if traces:
            found.append({"title": panel.title, "unit": panel.unit, "first": panel.first, "traces": traces})
    return found


def _traces(name: str, points: Points) -> list[dict[str, Any]]:
    """Return plotly traces without colours (the theme gives them by `role`): raw, and a trend if long."""
    points = thinned(points)
    if name == "dev_em":
        return [_trace(name, "points", points)]
    if len(points) < 2 * SMOOTHING:
        return [_trace(name, "trend", points)]
    return [_trace(name, "raw", points), _trace(name, "trend", smoothed(points))]


def _trace(name: str, role: str, points: Points) -> dict[str, Any]:
    return {
        "name": COLUMN_LABELS.get(name, name),
        "role": role,
        "x": [_short(step) for step, _ in points],
        "y": [_short(value) for _, value in points],
    }


def thinned(points: Points, limit: int = MAX_POINTS) -> Points:
    """Return at most `limit` points: means of equal blocks of values, at each block's last step."""
    size = math.ceil(len(points) / limit)
    blocks = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [(block[-1][0], _mean([value for _, value in block])) for block in blocks] or points


def smoothed(points: Points) -> Points:
    """Average over a centred window of len / SMOOTHING points, or what of it lies within the curve."""
    half = max(1, len(points) // SMOOTHING // 2)
    values = [value for _, value in points]
    return [
        (step, _mean(values[max(0, index - half) : index + half + 1]))
        for index, (step, _) in enumerate(points)
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _short(value: float) -> float | int:
    rounded = float(f"{value:.5g}") if abs(value) < 1e5 else value
    return int(rounded) if rounded.is_integer() else rounded


def seed_panels(curves: dict[str, list[Curve]]) -> list[dict[str, Any]]:
    """Return {title, unit, traces} of each panel with data: a thin line a seed, a strong one for the mean."""
    trained = {
        recipe: own
        for recipe, own in curves.items()
        if any(name in curve.columns for curve in own for name in SIGN_OF_SAMPLING)
    }
    found = []
    for column, title, unit in SEED_PANELS:
        traces = [trace for recipe, own in trained.items() for trace in _seed_traces(recipe, own, column)]
        if traces:
            found.append({"title": title, "unit": unit, "traces": traces})
    return found


def _seed_traces(recipe: str, curves: Sequence[Curve], column: str) -> list[dict[str, Any]]:
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
        for drawn in [thinned(points if column == "dev_em" else smoothed(points), SEED_POINTS)]
    ]


def mean_curve(seeds: Sequence[Points]) -> Points:
    """Average step by step over the seeds that have the step."""
    values: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            values[step].append(value)
    return [(step, sum(own) / len(own)) for step, own in sorted(values.items())]
