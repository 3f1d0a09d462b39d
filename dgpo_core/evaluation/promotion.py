"""Whether a model may take the champion's place: two evaluations, the conditions on them, and the decision.

A kept evaluation is a folder with an evaluation's `questions`, `arcap` and `diagnosis` (Parquet) and how it
was made (`made.json`), so that two can be compared.

Against a champion, all differences are paired over the same questions (those that failed for neither), with
bootstrap intervals of 95 %:

- gain: the whole interval of the average EM's difference is above `min_gain`;
- not worse: for every data set and every measurement of ARCap, the interval's lower end is above -margin;
- hacking: the rate of each check is at most `max_hacking` and not significantly above the champion's;
- failures: at most `max_failed` of the episodes failed.

All of them must hold. That is an intersection-union test: a wrong promotion needs an error in the test of
every condition that is not met, so its probability is at most that of a single test (2.5 %), and their number
needs no correction. The price is power: with many conditions a good challenger is refused more often.

Without a champion, the gain is measured against the student, and nothing is tested for being worse.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dgpo_core.config.params import PromoteConfig
from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import (
    CHECKS,
    Key,
    Measurement,
    Row,
    Scores,
    read_arcap,
    read_diagnoses,
    read_rows,
    read_scores,
    rounded,
)
from dgpo_core.evaluation.statistics import (
    Estimate,
    Resampling,
    mean_of_means,
    mean_with_interval,
    rate_difference,
)
from dgpo_core.files import read_json
from dgpo_core.text import markdown_cell

TABLES = ("questions.parquet", "arcap.parquet", "diagnosis.parquet")
SETUP = "made.json"  # in the folder of a kept evaluation


@dataclass(frozen=True)
class Setup:
    """How an evaluation was made (`made.json`).

    `model`: SHA-256 of the evaluated folder. `index`: the index's digest. `settings`: of the evaluation, by
    dotted key. `code`: DVC's hash of each source that it ran.
    """

    model: str
    index: str
    settings: dict[str, Any]
    code: dict[str, str]

    def as_json(self) -> str:
        """Return the content of `made.json`."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Evaluation:
    """What one model answered. `questions` identifies the asked questions with their golden answers."""

    setup: Setup
    questions: str
    scores: Scores
    arcap: dict[str, Measurement]
    diagnoses: dict[Key, Row]


def read_evaluation(folder: Path, datasets: Sequence[str]) -> Evaluation:
    """Read a kept evaluation. Raises UserError naming a file that is missing or malformed or lacks a set."""
    root, name = folder.parent, folder.name
    scores = read_scores(root, [name], datasets)[name]
    arcap = read_arcap(root, [name])[name]
    diagnoses = read_diagnoses(root, [name], scores.keys)[name]
    return Evaluation(read_setup(folder), _questions(folder), scores, arcap, diagnoses)


def differences(ours: Evaluation, theirs: Evaluation) -> list[str]:
    """Say why two evaluations cannot be compared; nothing when they were made alike."""
    found = []
    if ours.questions != theirs.questions:
        found.append("they were asked other questions")
    if ours.setup.index != theirs.setup.index:
        found.append(f"they searched other indexes ({ours.setup.index[:12]}, {theirs.setup.index[:12]})")
    if ours.arcap.keys() != theirs.arcap.keys():
        found.append(f"only one was measured in {', '.join(sorted(ours.arcap.keys() ^ theirs.arcap.keys()))}")
    found += [
        f"{name} was measured on other questions"
        for name in sorted(ours.arcap.keys() & theirs.arcap.keys())
        if ours.arcap[name].question_ids != theirs.arcap[name].question_ids
    ]
    mine, other = ours.setup.settings, theirs.setup.settings
    if unlike := [
        f"{k} {json.dumps(mine.get(k))}, {json.dumps(other.get(k))}" for k in unlike_keys(mine, other)
    ]:
        found.append(f"they were evaluated with other settings: {'; '.join(unlike)}")
    if code := unlike_keys(ours.setup.code, theirs.setup.code):
        found.append(f"they were evaluated by other code: {', '.join(code)}")
    return found


def unlike_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return the keys that only one of the two has, or with another value, sorted."""
    every = ours.keys() | theirs.keys()
    return sorted(k for k in every if k not in ours or k not in theirs or ours[k] != theirs[k])


def read_setup(folder: Path) -> Setup:
    """Read how a kept evaluation was made. Raises UserError."""
    path = folder / SETUP
    try:
        return read_json(path, Setup, "the origin of an evaluation")
    except OSError as error:
        raise UserError(f"{path}: not the origin of an evaluation: {error}") from error


def _questions(folder: Path) -> str:
    rows = read_rows(folder / TABLES[0], ("dataset", "question_id", "question", "golden_answers"))
    asked = sorted([r["dataset"], r["question_id"], r["question"], r["golden_answers"]] for r in rows)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


Values = NDArray[np.float64]
Verdict = Literal["promote", "keep", "refused"]
Kind = Literal["gain", "not_worse", "hacking", "failures"]
BEHAVIOUR = "thinking_searches"  # measurements of which neither more nor less is better: told, not judged


@dataclass(frozen=True)
class Condition:
    """One thing that must hold. `value` has the interval `low` to `high` and counts `n` questions."""

    name: str
    kind: Kind
    passed: bool
    value: float
    low: float
    high: float
    n: int
    bound: float
    why: str


@dataclass(frozen=True)
class Decision:
    """`keep`: a condition does not hold. `refused`: the evaluations allow no decision; `reasons` say why."""

    verdict: Verdict
    challenger: str
    champion: str | None
    reasons: list[str]
    conditions: list[Condition]
    told: dict[str, dict[str, float]]  # what was measured and not judged
    settings: dict[str, Any]

    @property
    def gain(self) -> Condition | None:
        """Return the condition on the gain, unless the decision was refused."""
        return next((condition for condition in self.conditions if condition.kind == "gain"), None)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON: floats to 6 digits, None where there is no value."""
        found: dict[str, Any] = rounded(asdict(self))
        return found


@dataclass(frozen=True)
class Candidate:
    """A model and the folder of its evaluation; `model` is the SHA-256 of its registered bytes."""

    name: str
    model: str
    folder: Path


def decide(
    challenger: Candidate,
    champion: Candidate | None,
    student: Candidate,
    datasets: Sequence[str],
    config: PromoteConfig,
) -> Decision:
    """Decide whether `challenger` takes the champion's place, or the first place when there is none.

    `student` is what the first champion is compared with. Never raises for an evaluation that is
    missing, malformed or of something else: that is refused.
    """
    other = champion or student
    rival = champion.name if champion else None
    conditions: list[Condition] = []
    told: dict[str, dict[str, float]] = {}
    try:
        ours, theirs = _checked(challenger, datasets), _checked(other, datasets)
        reasons = [
            f"{challenger.name} and {other.name} cannot be compared: {why}"
            for why in differences(ours, theirs)
        ]
        if not reasons:
            reasons = _too_few(ours, theirs, other.name, datasets, config)
    except UserError as error:
        reasons = [str(error)]
    if not reasons:
        conditions = judged(ours, theirs, other.name, champion is not None, datasets, config)
        told = _told(ours, theirs, Resampling(config.samples, config.seed))
    verdict: Verdict = "promote" if all(c.passed for c in conditions) else "keep"
    verdict = "refused" if reasons else verdict
    return Decision(verdict, challenger.name, rival, reasons, conditions, told, config.model_dump())


def _checked(candidate: Candidate, datasets: Sequence[str]) -> Evaluation:
    """Read a candidate's evaluation, of its own bytes. Raises UserError that names the candidate."""
    try:
        evaluation = read_evaluation(candidate.folder, datasets)
    except UserError as error:
        # where the evaluation lies at the moment is nobody's business
        raise UserError(f"{candidate.name}: {str(error).replace(f'{candidate.folder}/', '')}") from error
    if evaluation.setup.model != candidate.model:
        raise UserError(
            f"{candidate.name}: its evaluation is of other bytes ({evaluation.setup.model[:12]}) than its "
            f"own ({candidate.model[:12]}); evaluate it again"
        )
    return evaluation


def _too_few(
    ours: Evaluation, theirs: Evaluation, other: str, datasets: Sequence[str], config: PromoteConfig
) -> list[str]:
    """Name data sets and measurements with too few questions, and a rival that failed too often."""
    counts = {name: len(_paired_em(ours, theirs, name)) for name in datasets}
    counts |= {name: len(_paired(ours.arcap[name], theirs.arcap[name])) for name in ours.arcap}
    reasons = [
        f"{name}: {n} questions count, which is below promote.min_questions {config.min_questions}"
        for name, n in counts.items()
        if n < config.min_questions
    ]
    for part, (share, n) in _failures(theirs).items():
        if share > config.max_failed:
            reasons.append(f"{other}: {share:.1%} of the {n} {part} failed; evaluate it again")
    return reasons


def judged(
    ours: Evaluation,
    theirs: Evaluation,
    other: str,
    against_champion: bool,
    datasets: Sequence[str],
    config: PromoteConfig,
) -> list[Condition]:
    """Judge every condition on two evaluations that were made alike; `other` is the rival's name."""
    how = Resampling(config.samples, config.seed)
    em = {name: _paired_em(ours, theirs, name) for name in datasets}
    minimum = config.min_gain if against_champion else config.first_min_gain
    found = [_gain(mean_of_means(list(em.values()), signed=True, resampling=how), other, minimum)]
    if against_champion:
        for name in datasets:
            estimate = mean_with_interval(em[name], signed=True, resampling=how)
            found.append(_not_worse(f"EM on {name}", estimate, other, config.margin_of(name)))
        for name in _judged(ours):
            values = _paired(ours.arcap[name], theirs.arcap[name])
            estimate = mean_with_interval(values, signed=True, resampling=how)
            found.append(_not_worse(f"ARCap {name}", estimate, other, config.arcap_margin))
    for check in CHECKS:
        found.append(_hacking_rate(check, _flags(ours, check), config.max_hacking, how))
        if against_champion:
            found.append(_hacking_against(check, _flags(ours, check), _flags(theirs, check), other, how))
    for part, (share, n) in _failures(ours).items():
        limit, rate = config.max_failed, Estimate(share, math.nan, math.nan, n)
        why = f"{share:.1%} failed, at most {limit:.1%} may"
        found.append(_condition(f"failed {part}", "failures", share <= limit, rate, limit, why))
    return found


def _gain(estimate: Estimate, other: str, minimum: float) -> Condition:
    passed = estimate.low > minimum
    word = "is" if passed else "is not"
    why = f"the whole interval of the difference from {other} {word} above {minimum:g}"
    return _condition("gain in average EM", "gain", passed, estimate, minimum, why)


def _not_worse(name: str, estimate: Estimate, other: str, margin: float) -> Condition:
    passed = estimate.low > -margin  # False for nan
    may = "not" if passed else "possibly"
    why = f"{may} worse than {other} by more than {margin:g}"
    return _condition(name, "not_worse", passed, estimate, -margin, why)


def _hacking_rate(check: str, flags: Values, maximum: float, how: Resampling) -> Condition:
    values = flags[~np.isnan(flags)]
    if values.size == 0:
        nothing = Estimate(0.0, math.nan, math.nan, 0)
        return _condition(f"hacking {check}", "hacking", True, nothing, maximum, "there is nothing to check")
    estimate = mean_with_interval(values, resampling=how)
    passed = estimate.mean <= maximum
    why = f"the rate is {'at most' if passed else 'above'} {maximum:g}"
    return _condition(f"hacking {check}", "hacking", passed, estimate, maximum, why)


def _hacking_against(check: str, ours: Values, theirs: Values, other: str, how: Resampling) -> Condition:
    name = f"hacking {check}, difference"
    if np.isnan(ours).all() or np.isnan(theirs).all():
        nothing = Estimate(math.nan, math.nan, math.nan, 0)
        return _condition(name, "hacking", True, nothing, 0.0, "one of the two has nothing to check")
    estimate = rate_difference(ours, theirs, how)
    passed = not estimate.low > 0
    why = f"{'not ' if passed else ''}significantly above the rate of {other}"
    if math.isnan(estimate.low):
        why = f"too few questions to tell it from the rate of {other}"
    return _condition(name, "hacking", passed, estimate, 0.0, why)


def _condition(name: str, kind: Kind, passed: bool, estimate: Estimate, bound: float, why: str) -> Condition:
    return Condition(name, kind, passed, estimate.mean, estimate.low, estimate.high, estimate.n, bound, why)


def _paired_em(ours: Evaluation, theirs: Evaluation, dataset: str) -> Values:
    """Return differences of EM (-1, 0 or 1), one a question of the set that failed for neither."""
    mine = np.array([key[0] == dataset for key in ours.scores.keys], dtype=np.bool_)
    differences: Values = (ours.scores.values["em"] - theirs.scores.values["em"])[mine]
    return differences[~np.isnan(differences)]


def _paired(ours: Measurement, theirs: Measurement) -> Values:
    differences: Values = ours.values - theirs.values
    return differences[~np.isnan(differences)]


def _flags(evaluation: Evaluation, check: str) -> Values:
    """Return 1, 0, or nan where the check does not apply; one a question, in the questions' order."""
    flags = [row[check] for row in evaluation.diagnoses.values()]
    return np.array([math.nan if flag is None else float(flag) for flag in flags])


def _failures(evaluation: Evaluation) -> dict[str, tuple[float, int]]:
    """Return (share that failed, number) of the episodes of the test sets, and of ARCap's values."""
    parts = {"episodes of the test sets": evaluation.scores.failed}
    if evaluation.arcap:  # no set may play a part that ARCap measures
        failed = [measured.failed for measured in evaluation.arcap.values()]
        parts["values of ARCap"] = np.concatenate(failed)
    return {name: (float(failed.mean()), failed.size) for name, failed in parts.items()}


def _judged(evaluation: Evaluation) -> list[str]:
    return [name for name in evaluation.arcap if not name.startswith(BEHAVIOUR)]


def _told(ours: Evaluation, theirs: Evaluation, how: Resampling) -> dict[str, dict[str, float]]:
    """Return the differences that are no condition."""
    told = {}
    for name in ours.arcap.keys() - set(_judged(ours)):
        values = _paired(ours.arcap[name], theirs.arcap[name])
        estimate = mean_with_interval(values, signed=True, resampling=how)
        told[name] = {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}
    return dict(sorted(told.items()))


HEADS = ("holds", "condition", "value", "95 % interval", "bound", "n", "why")
NO_CHAMPION = "There is no champion yet: only absolute conditions, and the gain over the student."


def headline(decision: Decision) -> str:
    """Say the verdict in one sentence."""
    rival = f"in place of {decision.champion}" if decision.champion else "as the first champion"
    if decision.verdict == "refused":
        return f"Refused: {decision.challenger} cannot be judged {rival}"
    failed = sum(not condition.passed for condition in decision.conditions)
    if failed:
        what = "one condition does" if failed == 1 else f"{failed} conditions do"
        return f"Keep: {decision.challenger} is not promoted {rival}; {what} not hold"
    return f"Promote: {decision.challenger} may be promoted {rival}"


def cells(condition: Condition) -> tuple[str, ...]:
    """Write a condition as a row of the table under HEADS."""
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
    """Write the decision as it is kept with the version."""
    lines = [f"# {markdown_cell(headline(decision))}", ""]
    if not decision.champion:
        lines += [NO_CHAMPION, ""]
    lines += [f"- {markdown_cell(reason)}" for reason in decision.reasons]
    if decision.conditions:
        rows = [HEADS, tuple("---" for _ in HEADS), *map(cells, decision.conditions)]
        lines += [f"| {' | '.join(map(markdown_cell, row))} |" for row in rows]
    if decision.told:
        lines += ["", "Measurement, not judged:", ""]
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
