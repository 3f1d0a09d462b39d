"""Names of quantities and contrasts, for people."""

from dgpo_core.reporting.reproduction.conditions import Contrast
from dgpo_core.reporting.results import AVERAGE
from dgpo_core.reporting.words import PAPER_DATASETS, model_label

MINUS = "\N{MINUS SIGN}"
BEFORE_COLLAPSE = (  # sections B.3 and 5.6
    "The paper reports PPO at step 200 and DGPO without cold start just before their collapse; "
    "ours are the models that the runs evaluated."
)
# in the order of table 5; what the paper lacks comes last
MEASUREMENT_LABELS = {
    "source_em_nq": "source referencing, NQ",
    "source_em_nq_thinking": "source referencing with thinking, NQ",
    "source_em_musique": "source referencing, MuSiQue",
    "source_em_musique_thinking": "source referencing with thinking, MuSiQue",
    "query_hit_nq": "query rewriting, hit, NQ",
    "thinking_hit_musique": "thinking, hit, MuSiQue",
    "thinking_searches_musique": "thinking, searches, MuSiQue",
    "thinking_hit_nq": "thinking, hit, NQ",
    "thinking_searches_nq": "thinking, searches, NQ",
}


def quantity_label(quantity: str) -> str:
    if quantity == AVERAGE:
        return "average EM"
    return MEASUREMENT_LABELS.get(quantity) or f"EM, {PAPER_DATASETS.get(quantity, quantity)}"


def contrast_label(test: Contrast) -> str:
    """`DGPO − KD · average EM`; what all terms share, model or quantity, is said once."""
    models = {model for _, model, _ in test.terms}
    quantities = {quantity for _, _, quantity in test.terms}
    if len(models) == 1 and len(quantities) > 1:
        parts = [(weight, quantity_label(quantity)) for weight, _, quantity in test.terms]
        return f"{_sum(parts)} · {model_label(models.pop())}"
    parts = [(weight, model_label(model)) for weight, model, _ in test.terms]
    return f"{_sum(parts)} · {quantity_label(test.terms[0][2])}"


def _sum(parts: list[tuple[float, str]]) -> str:
    """Positive terms first: `with − without`, never `− without + with`."""
    ordered = sorted(parts, key=lambda part: part[0] < 0)
    texts = [name if abs(weight) == 1 else f"{abs(weight):g} × {name}" for weight, name in ordered]
    rest = [
        f" {MINUS if weight < 0 else '+'} {text}"
        for (weight, _), text in zip(ordered[1:], texts[1:], strict=True)
    ]
    return texts[0] + "".join(rest)


def bound_text(test: Contrast, low: float) -> str:
    """The bound that an interval reaches across."""
    return f"{(test.above if low <= test.above else test.below):g}".replace("-", MINUS)


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", MINUS)
