"""Conditions on our numbers that a claim may put; `verdicts` says whether one holds."""

from dataclasses import dataclass

from dgpo_core.reporting.reproduction.stability import State
from dgpo_core.reporting.results import AVERAGE

INFINITY = float("inf")


@dataclass(frozen=True)
class Contrast:
    """The weighted sum of (weight, model, quantity) lies between two bounds, interval and all."""

    terms: tuple[tuple[float, str, str], ...]
    above: float = 0.0
    below: float = INFINITY


@dataclass(frozen=True)
class Trains:
    """The recipe's training ends in one of the states, with every seed."""

    model: str
    states: tuple[State, ...]


@dataclass(frozen=True)
class Outlasts:
    """The second recipe's training collapses, and the first one's does not do so before it."""

    first: str
    second: str


@dataclass(frozen=True)
class ConvergesFaster:
    """Both recipes learn, and the first one's EM comes near its maximum in fewer steps."""

    first: str
    second: str


@dataclass(frozen=True)
class AtLeast:
    count: int
    parts: "tuple[Condition, ...]"


@dataclass(frozen=True)
class Untested:
    why: str


Condition = Contrast | Trains | Outlasts | ConvergesFaster | AtLeast | Untested


def both(*parts: Condition) -> AtLeast:
    return AtLeast(len(parts), parts)


def beats(first: str, second: str, quantity: str = AVERAGE) -> Contrast:
    return Contrast(((1.0, first, quantity), (-1.0, second, quantity)))


def beats_all(first: str, others: tuple[str, ...], quantity: str = AVERAGE) -> AtLeast:
    return both(*(beats(first, other, quantity) for other in others))


def thinking_adds(model: str, role: str, sign: float = 1.0) -> Contrast:
    source = f"source_em_{role}"
    return Contrast(((sign, model, f"{source}_thinking"), (-sign, model, source)))
