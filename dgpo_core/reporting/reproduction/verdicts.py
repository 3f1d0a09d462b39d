"""Judge the claims by what the seeds measured, and say so in words. The rule is the package's docstring."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.evaluation.statistics import CONFIDENCE
from dgpo_core.reporting.formats import MINUS, PAPER_DATASETS, model_label, signed
from dgpo_core.reporting.paper import paper_figure
from dgpo_core.reporting.reproduction.claims import (
    AtLeast,
    Claim,
    Contrast,
    ConvergesFaster,
    Criterion,
    Outlasts,
    Training,
    Trains,
    Untested,
    assess,
)
from dgpo_core.reporting.reproduction.seeds import PooledEstimate, SeedResults, combined, entry, pool

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced at our scale", "not reproduced", "not tested"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, NOT_TESTED)
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
Row = dict[str, Any]


@dataclass(frozen=True)
class CriterionResult:
    """Whether a criterion holds (None: not tested), and why. Only a contrast has `numbers`."""

    label: str
    holds: bool | None
    evidence: str
    remark: str = ""  # why it does not hold, in a few words
    numbers: Row | None = None
    parts: "list[CriterionResult]" = field(default_factory=list)

    def leaves(self) -> "list[CriterionResult]":
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]


@dataclass(frozen=True)
class Judge:
    """Tests claims against what the seeds measured; `published` is what each model is in the paper: (pair,
    recipe)."""

    results: SeedResults
    trainings: Mapping[str, list[Training]]
    published: Mapping[str, tuple[str, str]]
    done: dict[tuple[Criterion, float], CriterionResult] = field(default_factory=dict)  # claims share them

    def verdict(self, claim: Claim, pair: str = "") -> Row:
        """Judge a claim: an entry of verdicts.json. `pair` is the paper's that the runs stand for."""
        test: Criterion = claim.criterion
        if claim.pair and claim.pair != pair:
            test = Untested(f"not run: these runs stand for {pair}")
        finding = self.find(test)
        return {
            "claim": claim.name,
            "statement": claim.statement,
            "source": claim.source,
            "verdict": {True: REPRODUCED, False: NOT_REPRODUCED, None: NOT_TESTED}[finding.holds],
            "remark": finding.remark,
            "evidence": finding.evidence,
            "tests": [
                {"label": leaf.label, "holds": leaf.holds, "evidence": leaf.evidence, "numbers": leaf.numbers}
                for leaf in finding.leaves()
            ],
        }

    def find(self, test: Criterion, confidence: float = CONFIDENCE) -> CriterionResult:
        """Test a criterion, with its intervals at the level `confidence`."""
        if (test, confidence) not in self.done:
            self.done[test, confidence] = self._find(test, confidence)
        return self.done[test, confidence]

    def _find(self, test: Criterion, confidence: float) -> CriterionResult:
        match test:
            case Contrast():
                return self._contrast(test, confidence)
            case Trains(model, states):
                label = f"{model_label(model)}: training {' or '.join(states)}"
                return self._trained(label, [model], lambda own: own.state in states, training_text)
            case Outlasts(first, second):
                label = f"{model_label(first)} outlasts {model_label(second)}"
                return self._trained(label, [first, second], _outlasts, training_text)
            case ConvergesFaster(first, second):
                label = f"{model_label(first)} converges faster than {model_label(second)}"
                return self._trained(label, [first, second], _faster, _convergence_text)
            case AtLeast():
                return self._at_least(test, confidence)
            case Untested():
                return CriterionResult("", None, test.why)

    def _contrast(self, test: Contrast, confidence: float) -> CriterionResult:
        label = contrast_label(test)
        weighted, missing = [], []
        for weight, model, quantity in test.terms:
            if (samples := self.results.of(model, quantity)) is not None:
                weighted.append((weight, samples))
            else:
                name = model_label(model)
                missing.append(name if quantity == AVERAGE else f"{name} ({quantity})")
        if missing:
            return CriterionResult(label, None, f"not run: {', '.join(dict.fromkeys(missing))}")
        pooled = pool(combined(weighted), confidence, signed=len(weighted) > 1)
        numbers = entry(pooled, self.results.seeds, self._paper(test), confidence)
        numbers |= {"confidence": round(confidence, 6)}
        holds, remark = _within(test, pooled)
        return CriterionResult(label, holds, _joined(remark, numbers_text(numbers)), remark, numbers)

    def _paper(self, test: Contrast) -> float | None:
        """Return the paper's figure of a contrast, or None where it has no figure of a term."""
        places = [(*self.published[model], quantity) for _, model, quantity in test.terms]
        if len(set(places)) < len(places):  # two profiles that stand for one pair are not two of its models
            return None
        figures = [paper_figure(*place) for place in places]
        known = [weight * f for (weight, _, _), f in zip(test.terms, figures, strict=True) if f is not None]
        return sum(known) if len(known) == len(figures) else None

    def _trained(
        self, label: str, models: list[str], holds: Callable[..., bool], text: Callable[[Training], str]
    ) -> CriterionResult:
        """Test whether it holds of the recipes' trainings with every seed."""
        for model in models:
            if model not in self.trainings:
                return CriterionResult(label, None, f"no training curve of {model_label(model)}")
        seeds = list(zip(*(self.trainings[model] for model in models), strict=True))
        agree = [holds(*own) for own in seeds]
        remark = "" if all(agree) or not any(agree) else "no clear difference, the seeds disagree"
        texts = [" against ".join(map(text, own)) for own in seeds]
        evidence = [f"seed {seed} {each}" for seed, each in zip(self.results.seeds, texts, strict=True)]
        return CriterionResult(label, all(agree), _joined(remark, ", ".join(evidence)), remark)

    def _at_least(self, test: AtLeast, confidence: float) -> CriterionResult:
        """Test in three values: what was not tested may turn out either way, unless the rest decides."""
        level = 1 - (1 - confidence) / (len(test.parts) - test.count + 1)
        parts = [self.find(part, level) for part in test.parts]
        hold, fail, untested = ([p for p in parts if p.holds is state] for state in (True, False, None))
        holds = True if len(hold) >= test.count else False if len(parts) - len(fail) < test.count else None
        remark = f"{len(hold)} of {len(parts)} hold, {test.count} needed"
        lists = [
            f"; {name}: {_listed(own)}" for name, own in (("not", fail), ("not tested", untested)) if own
        ]
        tails = {part.label.rpartition(" · ")[2] for part in parts}  # for the lists of an enclosing group
        label = tails.pop() if len(tails) == 1 else f"{len(parts)} comparisons"
        return CriterionResult(label, holds, remark + "".join(lists), remark, None, parts)


def _joined(remark: str, text: str) -> str:
    return f"{remark}: {text}" if remark else text


def _listed(parts: Sequence[CriterionResult]) -> str:
    """List labels `what · on what` in one line, and say once what all of them share."""
    labels = [part.label.partition(" · ") for part in parts]
    heads, tails = {head for head, _, _ in labels}, {tail for _, _, tail in labels}
    if len(labels) > 1 and len(tails) == 1:
        return f"{', '.join(head for head, _, _ in labels)}{' · ' * any(tails)}{tails.pop()}"
    if len(labels) > 1 and len(heads) == 1:
        return f"{heads.pop()} · {'; '.join(tail for _, _, tail in labels)}"
    return "; ".join(part.label for part in parts)


def _outlasts(ours: Training, theirs: Training) -> bool:
    return theirs.state == "collapsed" and ours.state != "never learned" and _step(ours) > _step(theirs)


def _step(training: Training) -> float:
    return training.step if training.state == "collapsed" and training.step is not None else float("inf")


def _faster(ours: Training, theirs: Training) -> bool:
    if ours.converged is None or theirs.converged is None:
        return False
    return ours.converged < theirs.converged


def _within(test: Contrast, pooled: PooledEstimate) -> tuple[bool | None, str]:
    """Test whether the interval and every seed's own mean lie between the bounds; say why not."""
    low, high = pooled.estimate.low, pooled.estimate.high
    if low != low or high != high:
        return None, "too few questions for an interval"
    inside = [test.above < mean < test.below for mean in pooled.seeds]
    if test.above < low and high < test.below:
        if all(inside):
            return True, ""
        return False, f"no clear difference, it holds with {sum(inside)} of {len(inside)} seeds only"
    if high < test.above or low > test.below:
        return False, "the opposite"
    bound = f"{(test.above if low <= test.above else test.below):g}".replace("-", MINUS)
    return False, f"no clear difference, the interval includes {bound}"


def numbers_text(numbers: Row) -> str:
    """Write the numbers behind a contrast in one line, every seed's own among them."""
    low, high = numbers["ci95"]
    seeds = ", ".join(f"seed {seed} {signed(mean)}" for seed, mean in numbers["seeds"].items())
    level = f"{100 * numbers['confidence']:.3g} %"
    over_seeds = seeds_interval_text(numbers)
    interval = ""
    if low is not None:
        own = f"; {over_seeds}" if over_seeds else ""
        interval = f" ({level} interval {signed(low)} to {signed(high)}{own})"
    published = "" if numbers["paper"] is None else f"; paper {signed(numbers['paper'])}"
    return f"{signed(numbers['mean'])}{interval}, {numbers['n']:,} questions; {seeds}{published}"


def seeds_interval_text(numbers: Row) -> str:
    """Write the t interval over the seeds; empty with a single one."""
    low, high = numbers["seeds_ci95"]
    return "" if low is None else f"over seeds {signed(low)} to {signed(high)}"


def training_text(training: Training) -> str:
    where = f" over {training.steps} steps" if training.step is None else f" at step {training.step}"
    drift = f" ({training.drift})" if training.drift else ""
    return f"{training.state}{where}{drift}"


def _convergence_text(training: Training) -> str:
    return training.state if training.converged is None else f"converged at step {training.converged}"


def trainings(results: SeedResults) -> dict[str, list[Training]]:
    """Assess the trainings, one a seed, of every recipe that left an EM curve with each."""
    found: dict[str, list[Training]] = {}
    for recipe, curves in results.curves.items():
        own = [training for curve in curves if (training := assess(curve))]
        if len(own) == len(curves):
            found[recipe] = own
    return found


def quantity_label(quantity: str) -> str:
    if quantity == AVERAGE:
        return "average EM"
    return MEASUREMENT_LABELS.get(quantity) or f"EM, {PAPER_DATASETS.get(quantity, quantity)}"


def contrast_label(test: Contrast) -> str:
    """Write `DGPO − KD · average EM`; what all terms share, model or quantity, is said once."""
    models = {model for _, model, _ in test.terms}
    quantities = {quantity for _, _, quantity in test.terms}
    if len(models) == 1 and len(quantities) > 1:
        parts = [(weight, quantity_label(quantity)) for weight, _, quantity in test.terms]
        return f"{_sum(parts)} · {model_label(models.pop())}"
    parts = [(weight, model_label(model)) for weight, model, _ in test.terms]
    return f"{_sum(parts)} · {quantity_label(test.terms[0][2])}"


def _sum(parts: list[tuple[float, str]]) -> str:
    """Write a sum with its positive terms first: `with − without`, never `− without + with`."""
    ordered = sorted(parts, key=lambda part: part[0] < 0)
    texts = [name if abs(weight) == 1 else f"{abs(weight):g} × {name}" for weight, name in ordered]
    signs = ["", *(f" {MINUS if weight < 0 else '+'} " for weight, _ in ordered[1:])]
    return "".join(sign + text for sign, text in zip(signs, texts, strict=True))
