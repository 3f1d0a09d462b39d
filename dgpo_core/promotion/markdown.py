"""A decision as text, for people: Markdown that is kept with the version, and cells for the terminal."""

import math

from dgpo_core.promotion.decision import Condition, Decision
from dgpo_core.text import markdown_cell

HEADS = ("holds", "condition", "value", "95 % interval", "bound", "n", "why")
NO_CHAMPION = "There is no champion yet: only absolute conditions, and the gain over the student."


def headline(decision: Decision) -> str:
    """The verdict in one sentence."""
    rival = f"in place of {decision.champion}" if decision.champion else "as the first champion"
    if decision.verdict == "refused":
        return f"Refused: {decision.challenger} cannot be judged {rival}"
    failed = sum(not condition.passed for condition in decision.conditions)
    if failed:
        what = "one condition does" if failed == 1 else f"{failed} conditions do"
        return f"Keep: {decision.challenger} is not promoted {rival}; {what} not hold"
    return f"Promote: {decision.challenger} may be promoted {rival}"


def cells(condition: Condition) -> tuple[str, ...]:
    """A row of the table under HEADS."""
    signed = condition.kind in ("gain", "not_worse") or condition.name.endswith("difference")
    interval = f"{_number(condition.low, signed)} to {_number(condition.high, signed)}"
    bound = f"{'>' if condition.kind in ('gain', 'not_worse') else '≤'} {condition.bound:g}"
    return (
        "yes" if condition.passed else "NO",
        condition.name,
        _number(condition.value, signed),
        "" if math.isnan(condition.low) else interval,
        bound,
        f"{condition.n:,}",
        condition.why,
    )


def markdown(decision: Decision) -> str:
    lines = [f"# {markdown_cell(headline(decision))}", ""]
    if not decision.champion:
        lines += [NO_CHAMPION, ""]
    lines += [f"- {markdown_cell(reason)}" for reason in decision.reasons]
    if decision.conditions:
        rows = [HEADS, tuple("---" for _ in HEADS), *map(cells, decision.conditions)]
        lines += [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]
    if decision.told:
        lines += ["", "Measured, not judged:", ""]
        lines += [
            f"- {name}: {_number(told['difference'], True)} "
            f"({_number(told['low'], True)} to {_number(told['high'], True)})"
            for name, told in decision.told.items()
        ]
    return "\n".join(lines) + "\n"


def _number(value: float, signed: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:+.3f}" if signed else f"{value:.3f}"
