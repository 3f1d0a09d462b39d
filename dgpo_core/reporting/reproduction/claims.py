"""The criteria for the paper's claims (reporting/paper/claims.csv), and how a training went.

`Contrast` quantities are `average` (EM over the data sets), a data set of the paper's (EM), or a measurement
of ARCap. The margins (`SIMILAR`, `APPROACHING`, near zero) are ours: the paper gives none.

Some claims are about trainings that collapse (section 3.3, 5.7, figures 4 and 6). The paper shows curves and
calls some of them collapsed. Here, on the EM of the sampled episodes (held-out EM where a curve lacks it), as
a moving average:

- never learned: it never reaches NEAR_ZERO, so there is nothing to lose;
- collapsed: at the end it is under half of its earlier maximum, and since then invalid actions have risen by
  more than INVALID_RISE an episode or the response has become LENGTH_DRIFT times longer or shorter;
- fell: the same loss without such a drift;
- stable: anything else. It says so of the steps that were run, not of more.

The step is the first from which the EM stays under half of its earlier maximum. A training has converged at
the first step whose EM is at least CONVERGED of its maximum.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting import paper
from dgpo_core.reporting.curves import Curve, smoothed
from dgpo_core.reporting.formats import PAPER_DATASETS

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
    """Assess a training by its curve; None for a curve without any EM, of which nothing can be said."""
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
    """Return the first place from which each value stays under LOST of the maximum before it."""
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
    """Say what changed between the best step and the time since the loss; empty where nothing did."""
    found = []
    for column, name, places in (("invalid_actions", "invalid actions", 2), ("response_tokens", "tokens", 0)):
        points = curve.columns.get(column, [])
        values = [value for step, value in points if step >= after]
        if not values:
            continue
        at_best = min(smoothed(points), key=lambda point: abs(point[0] - before))[1]
        since = sum(values) / len(values)
        if column == "invalid_actions":
            drifted = since > at_best + INVALID_RISE
        else:
            drifted = since > LENGTH_DRIFT * at_best or since < at_best / LENGTH_DRIFT
        if drifted:
            found.append(f"{name} {at_best:.{places}f} → {since:.{places}f}")
    return ", ".join(found)


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
    """At least `count` of the parts hold."""

    count: int
    parts: "tuple[Criterion, ...]"


@dataclass(frozen=True)
class Untested:
    """Our numbers cannot test it, and why."""

    why: str


Criterion = Contrast | Trains | Outlasts | ConvergesFaster | AtLeast | Untested


def both(*parts: Criterion) -> AtLeast:
    """Require all parts."""
    return AtLeast(len(parts), parts)


def beats(first: str, second: str, quantity: str = AVERAGE) -> Contrast:
    """Require first - second to be above zero."""
    return Contrast(((1.0, first, quantity), (-1.0, second, quantity)))


def beats_all(first: str, others: tuple[str, ...], quantity: str = AVERAGE) -> AtLeast:
    """Require the first model to beat each of the others."""
    return both(*(beats(first, other, quantity) for other in others))


def thinking_adds(model: str, role: str, sign: float = 1.0) -> Contrast:
    """Require thinking to raise source referencing, or with sign -1 to lower it."""
    source = f"source_em_{role}"
    return Contrast(((sign, model, f"{source}_thinking"), (-sign, model, source)))


SIMILAR = 0.05  # two shares are similar when the interval of their difference stays within this
APPROACHING = 0.9  # of the teacher's EM; the paper's own share is 0.329 / 0.353 = 0.93


@dataclass(frozen=True)
class Claim:
    """One of the paper's claims, with its place in the paper."""

    name: str
    statement: str
    source: str
    criterion: Criterion
    group: str  # its heading in the report
    pair: str  # of the paper's models, where the claim is about this one alone


BASELINES = ("ppo", "sft_ppo", "gkd", "seqkd", "kd", "distillm", "taid")
OFF_POLICY = ("seqkd", "kd", "distillm", "taid")
ABLATIONS = ("no_cold_start", "uniform_kl", "no_teacher", "ppo_kd")
PROFILED = ("student", "teacher", "ppo", "kd", "dgpo")  # the models of table 5
OVER_TEACHER = tuple(beats("dgpo", "teacher", name) for name in PAPER_DATASETS)
OTHER_SIZES = Untested("needs several pairs of models: see sizes.html, which has all profiles that were run")

CRITERIA: dict[str, Criterion] = {
    # main results
    "student_near_zero": Contrast(((1.0, "student", AVERAGE),), above=-INFINITY, below=NEAR_ZERO),
    "dgpo_over_student": beats("dgpo", "student"),
    **{f"dgpo_over_{model}": beats("dgpo", model) for model in BASELINES},
    "dgpo_best_average": beats_all("dgpo", BASELINES),
    "dgpo_best_on_most_sets": AtLeast(
        4, tuple(beats_all("dgpo", BASELINES, name) for name in PAPER_DATASETS)
    ),
    "dgpo_approaches_teacher": Contrast(((1.0, "dgpo", AVERAGE), (-APPROACHING, "teacher", AVERAGE))),
    "dgpo_surpasses_teacher_somewhere": AtLeast(1, OVER_TEACHER),
    "dgpo_surpasses_teacher_on_three": AtLeast(3, OVER_TEACHER),
    "off_policy_over_on_policy": both(*(beats(off, on) for on in ("ppo", "gkd") for off in OFF_POLICY)),
    "kd_over_seqkd": beats("kd", "seqkd"),
    "kd_over_sft_ppo": beats("kd", "sft_ppo"),
    "rl_gains_less_after_sft": Contrast(
        ((1.0, "dgpo", AVERAGE), (-1.0, "kd", AVERAGE), (-1.0, "sft_ppo", AVERAGE), (1.0, "seqkd", AVERAGE))
    ),
    "interpolation_below_kd": beats_all("kd", ("distillm", "taid")),
    # components
    "cold_start": beats("dgpo", "no_cold_start"),
    "selective_kl": beats("dgpo", "uniform_kl"),
    "teacher_guidance": beats("dgpo", "no_teacher"),
    "pipeline_order": beats("dgpo", "ppo_kd"),
    "all_components": beats_all("dgpo", ABLATIONS),
    "cold_start_least": beats_all("no_cold_start", ABLATIONS[1:]),
    "dgpo_best_variant": beats_all("dgpo", ("dgpo_grpo", "no_cold_start", "gkd", "kd_gkd")),
    # training
    "dgpo_stable": Trains("dgpo", ("stable",)),
    "ppo_collapses": Trains("ppo", ("collapsed",)),
    "ppo_ineffective": Trains("ppo", ("collapsed", "never learned")),
    "grpo_less_stable_than_ppo": both(Outlasts("ppo", "grpo"), ConvergesFaster("grpo", "ppo")),
    "grpo_collapses": Trains("dgpo_grpo", ("collapsed",)),
    "no_cold_start_collapses": Trains("no_cold_start", ("collapsed",)),
    "no_cold_start_outlasts_ppo": Outlasts("no_cold_start", "ppo"),
    "kd_prevents_collapse": both(Trains("dgpo", ("stable",)), Trains("no_cold_start", ("collapsed",))),
    "gkd_stable_but_worse": both(Trains("gkd", ("stable",)), beats("dgpo", "gkd")),
    "kd_gkd_collapses": Trains("kd_gkd", ("collapsed",)),
    # ARCap
    "source_nq_dgpo_best": beats_all("dgpo", ("student", "ppo", "kd"), "source_em_nq"),
    "source_musique_kd_best": beats_all("kd", ("student", "ppo", "dgpo"), "source_em_musique"),
    "query_ppo_best": beats_all("ppo", ("teacher", "kd", "dgpo"), "query_hit_nq"),
    "query_dgpo_over_kd": beats("dgpo", "kd", "query_hit_nq"),
    "query_dgpo_like_teacher": replace(
        beats("dgpo", "teacher", "query_hit_nq"), above=-SIMILAR, below=SIMILAR
    ),
    "thinking_hurts_musique": both(*(thinking_adds(model, "musique", -1.0) for model in PROFILED)),
    "thinking_hurts_teacher": both(*(thinking_adds("teacher", role, -1.0) for role in ("nq", "musique"))),
    "thinking_helps_rl": both(*(thinking_adds(model, "nq") for model in ("ppo", "dgpo"))),
    "final_hit_dgpo_best": beats_all("dgpo", ("student", "ppo", "kd"), "thinking_hit_musique"),
    "distilled_search_more": both(*(beats(m, "ppo", "thinking_searches_musique") for m in ("kd", "dgpo"))),
    "dgpo_searches_more_than_teacher": beats("dgpo", "teacher", "thinking_searches_musique"),
    # other models
    "dgpo_best_qwen2.5-7b-to-0.5b": beats_all("dgpo", ("ppo", "kd")),
    "dgpo_best_llama3-8b-to-1b": beats_all("dgpo", ("ppo", "kd")),
    "smaller_gap_better": OTHER_SIZES,
    "rl_small_behind_large": OTHER_SIZES,
    "teacher_costs_little": Untested(
        "stages share a machine, so a run's times are not its own: `python -m benchmarks.teacher_cost` tells"
    ),
}
ACROSS = "Across pairs of models"  # the group of the claims that sizes.py tests


def make_claims(criteria: Mapping[str, Criterion], across: bool = False) -> list[Claim]:
    """Return the paper's claims with their criteria: those about one pair of models, or across pairs."""
    return [
        Claim(
            row["claim"],
            row["statement"].format(approaching=APPROACHING, similar=SIMILAR),
            row["source"],
            criteria[row["claim"]],
            row["group"],
            row["pair"],
        )
        for row in paper.paper_claims()
        if (row["group"] == ACROSS) == across
    ]


CLAIMS = make_claims(CRITERIA)
