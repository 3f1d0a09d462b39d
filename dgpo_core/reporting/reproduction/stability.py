"""Does a training collapse? (paper, section 3.3, 5.7, figures 4 and 6)

The paper shows curves and calls some of them collapsed. Here, on the EM of the sampled episodes (held-out EM
where a curve lacks it), as a moving average:

- never learned: it never reaches NEAR_ZERO, so there is nothing to lose;
- collapsed: at the end it is under half of its earlier maximum, and since then invalid actions have risen by
  more than INVALID_RISE an episode or the response has become LENGTH_DRIFT times longer or shorter;
- fell: the same loss without such a drift;
- stable: anything else. It says so of the steps that were run, not of more.

The step is the first from which the EM stays under half of its earlier maximum. A training has converged at
the first step whose EM is at least CONVERGED of its maximum.
"""

from dataclasses import dataclass
from typing import Literal

from dgpo_core.reporting.curves import Curve, Points, smoothed

NEAR_ZERO = 0.05  # EM
LOST = 0.5  # of the earlier maximum
CONVERGED = 0.9  # of the maximum
INVALID_RISE = 0.25  # invalid actions an episode
LENGTH_DRIFT = 2.0
State = Literal["collapsed", "fell", "never learned", "stable"]


@dataclass(frozen=True)
class Training:
    """How one training went; `step` is where it was lost, `drift` what went with it.

    `converged` is the step at which it came near its maximum, None where it never learned.
    """

    state: State
    step: int | None
    best: float
    last: float
    steps: int
    drift: str
    converged: int | None


def assess(curve: Curve) -> Training | None:
    """None for a curve without any EM: of such a training nothing can be said."""
    points = curve.columns.get("em") or curve.columns.get("dev_em")
    if not points:
        return None
    em = smoothed(points)
    values = [value for _, value in em]
    best, last, steps = max(values), values[-1], int(em[-1][0])
    if best < NEAR_ZERO:
        return Training("never learned", None, best, last, steps, "", None)
    converged = next(int(step) for step, value in em if value >= CONVERGED * best)
    if (lost := _lost_from(values)) is None:
        return Training("stable", None, best, last, steps, "", converged)
    peak = values.index(max(values[:lost]))
    drift = _drift(curve, em[peak][0], em[lost][0])
    return Training("collapsed" if drift else "fell", int(em[lost][0]), best, last, steps, drift, converged)


def _lost_from(values: list[float]) -> int | None:
    """The first place from which each value stays under LOST of the maximum before it."""
    lost = None
    highest = values[0]
    for index, value in enumerate(values):
        if value >= LOST * highest:
            lost = None
        elif lost is None:
            lost = index
        highest = max(highest, value)
    return lost


def _drift(curve: Curve, before: float, after: float) -> str:
    """What changed between the best step and the time since the loss; empty where nothing did."""
    found = []
    if levels := _levels(curve.columns.get("invalid_actions"), before, after):
        at_best, since = levels
        if since > at_best + INVALID_RISE:
            found.append(f"invalid actions {at_best:.2f} → {since:.2f}")
    if levels := _levels(curve.columns.get("response_tokens"), before, after):
        at_best, since = levels
        if since > LENGTH_DRIFT * at_best or since < at_best / LENGTH_DRIFT:
            found.append(f"tokens {at_best:.0f} → {since:.0f}")
    return ", ".join(found)


def _levels(points: Points | None, before: float, after: float) -> tuple[float, float] | None:
    """The column near the best step, and its mean from the loss on."""
    since = [value for step, value in points or () if step >= after]
    if not points or not since:
        return None
    at_best = min(smoothed(points), key=lambda point: abs(point[0] - before))[1]
    return at_best, sum(since) / len(since)
