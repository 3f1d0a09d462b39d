"""The paper's claims as data: what it says, where, and which criterion on our numbers would agree.

`Contrast` quantities are `average` (EM over the data sets), a data set of the paper's (EM), or a measurement
of ARCap. The margins (`SIMILAR`, `APPROACHING`, near zero) are ours: the paper gives none.

Some claims are about trainings that collapse (section 3.3, 5.7, figures 4 and 6). The paper shows curves and
calls some of them collapsed. Here, on the EM of the sampled episodes (held-out EM
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

from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting.curves import Curve, Points, smoothed
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
    """Return the column near the best step, and its mean from the loss on."""
    since = [value for step, value in points or () if step >= after]
    if not points or not since:
        return None
    at_best = min(smoothed(points), key=lambda point: abs(point[0] - before))[1]
    return at_best, sum(since) / len(since)


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
    pair: str | None = None  # of the paper's models, where the claim is about this one alone
    needs: str | None = None  # the row of a recipe that the default table does not have


BASELINES = ("ppo", "sft_ppo", "gkd", "seqkd", "kd", "distillm", "taid")
OFF_POLICY = ("seqkd", "kd", "distillm", "taid")
ABLATIONS = ("no_cold_start", "uniform_kl", "no_teacher", "ppo_kd")
PROFILED = ("student", "teacher", "ppo", "kd", "dgpo")  # the models of table 5
RAW_GRPO = "grpo: {start: student, algorithm: grpo, guidance: uniform, reference: initial}"
OTHER_SIZES = Untested("needs several pairs of models: see sizes.html, which has all profiles that were run")

OVERALL = (
    Claim(
        "student_near_zero",
        "The student starts near zero.",
        "section 5.2, table 2 (0.006)",
        Contrast(((1.0, "student", AVERAGE),), above=-INFINITY, below=NEAR_ZERO),
    ),
    Claim(
        "dgpo_over_student",
        "DGPO turns the student into a search agent.",
        "section 6, table 2 (0.006 → 0.329)",
        beats("dgpo", "student"),
    ),
    *(
        Claim(f"dgpo_over_{model}", f"DGPO beats {label}.", "section 5.2, table 2", beats("dgpo", model))
        for model, label in zip(
            BASELINES, ("PPO", "SFT → PPO", "GKD", "SeqKD", "KD", "DistiLLM", "TAID"), strict=True
        )
    ),
    Claim(
        "dgpo_best_average",
        "DGPO has the highest average of all baselines.",
        "section 5.2, table 2",
        beats_all("dgpo", BASELINES),
    ),
    Claim(
        "dgpo_best_on_most_sets",
        "DGPO outperforms all baselines on most data sets.",
        "section 5.2, table 2 (six of seven)",
        AtLeast(4, tuple(beats_all("dgpo", BASELINES, name) for name in PAPER_DATASETS)),
    ),
    Claim(
        "dgpo_approaches_teacher",
        f"DGPO approaches the teacher: at least {APPROACHING:.0%} of its EM.",
        "section 6, table 2 (0.329 of 0.353)",
        Contrast(((1.0, "dgpo", AVERAGE), (-APPROACHING, "teacher", AVERAGE))),
    ),
    Claim(
        "dgpo_surpasses_teacher_somewhere",
        "DGPO surpasses the teacher on some data set.",
        "abstract and section 5.2, table 2 (NQ, PopQA, HotpotQA)",
        AtLeast(1, tuple(beats("dgpo", "teacher", name) for name in PAPER_DATASETS)),
    ),
    Claim(
        "dgpo_surpasses_teacher_on_three",
        "DGPO surpasses the teacher on three data sets.",
        "section 5.2, table 2",
        AtLeast(3, tuple(beats("dgpo", "teacher", name) for name in PAPER_DATASETS)),
    ),
    Claim(
        "off_policy_over_on_policy",
        "On-policy methods (PPO, GKD) are below every off-policy distillation.",
        "section 5.2, table 2",
        both(*(beats(off, on) for on in ("ppo", "gkd") for off in OFF_POLICY)),
    ),
    Claim(
        "kd_over_seqkd",
        "KD beats SeqKD: soft targets transfer more than hard ones.",
        "section 2 and 5.2, table 2",
        beats("kd", "seqkd"),
    ),
    Claim(
        "kd_over_sft_ppo",
        "KD alone is stronger than SFT followed by RL.",
        "section 5.2, table 2 (0.298, 0.289)",
        beats("kd", "sft_ppo"),
    ),
    Claim(
        "rl_gains_less_after_sft",
        "RL adds less after an SFT start than DGPO adds after KD.",
        "section 5.2, table 2 (0.275 → 0.289; 0.298 → 0.329)",
        Contrast(
            (
                (1.0, "dgpo", AVERAGE),
                (-1.0, "kd", AVERAGE),
                (-1.0, "sft_ppo", AVERAGE),
                (1.0, "seqkd", AVERAGE),
            )
        ),
    ),
    Claim(
        "interpolation_below_kd",
        "DistiLLM and TAID are worse than standard KD.",
        "section 5.2, table 2",
        beats_all("kd", ("distillm", "taid")),
    ),
)

OTHER_PAIRS = (
    *(
        Claim(
            f"dgpo_best_{pair}",
            f"DGPO beats PPO and KD with {label}.",
            "section 5.2 and D, tables 3, 11, 12",
            beats_all("dgpo", ("ppo", "kd")),
            pair,
        )
        for pair, label in (("qwen2.5-7b-to-0.5b", "Qwen 7B → 0.5B"), ("llama3-8b-to-1b", "Llama 8B → 1B"))
    ),
    Claim(
        "smaller_gap_better",
        "With a 3B teacher DGPO is slightly better than with a 7B teacher.",
        "section 5.2, table 3 (0.329, 0.323)",
        OTHER_SIZES,
    ),
    Claim(
        "rl_small_behind_large",
        "RL lifts every model size, but small ones stay far behind large ones.",
        "section 3.3, figure 3",
        OTHER_SIZES,
    ),
    Claim(
        "teacher_costs_little",
        "The teacher's guidance adds 9.5 % to the training time.",
        "Limitations",
        Untested("times are in no output of a run"),
    ),
)

COMPONENTS = (
    Claim("cold_start", "(a) The cold start adds.", "section 5.6, table 6", beats("dgpo", "no_cold_start")),
    Claim(
        "selective_kl",
        "(b) The selective KL penalty beats the uniform one.",
        "section 5.6, table 6",
        beats("dgpo", "uniform_kl"),
    ),
    Claim(
        "teacher_guidance",
        "(c) The teacher's guidance in RL adds.",
        "section 5.6, table 6",
        beats("dgpo", "no_teacher"),
    ),
    Claim(
        "pipeline_order",
        "(d) KD then PPO beats PPO then KD.",
        "section 5.6, table 6",
        beats("dgpo", "ppo_kd"),
    ),
    Claim(
        "all_components",
        "All components are essential.",
        "section 5.6, table 6",
        beats_all("dgpo", ABLATIONS),
    ),
    Claim(
        "cold_start_least",
        "Going without the cold start costs least of all ablations.",
        "section 5.6, table 6 (“relatively small”)",
        beats_all("no_cold_start", ABLATIONS[1:]),
    ),
    Claim(
        "dgpo_best_variant",
        "DGPO performs best of its variants.",
        "section 5.7, figure 6",
        beats_all("dgpo", ("dgpo_grpo", "no_cold_start", "gkd", "kd_gkd")),
    ),
)

DYNAMICS = (
    Claim("dgpo_stable", "DGPO trains stably.", "section 5.7, figure 6", Trains("dgpo", ("stable",))),
    Claim(
        "ppo_collapses",
        "PPO from the raw student collapses.",
        "section 3.3 and B.3, figure 4",
        Trains("ppo", ("collapsed",)),
    ),
    Claim(
        "ppo_ineffective",
        "RL from the raw student is ineffective (ours: it collapses or never learns).",
        "section 1",
        Trains("ppo", ("collapsed", "never learned")),
    ),
    Claim(
        "grpo_less_stable_than_ppo",
        "GRPO from the raw student is less stable than PPO, and converges faster.",
        "section 3.3, figure 4",
        both(Outlasts("ppo", "grpo"), ConvergesFaster("grpo", "ppo")),
        needs=RAW_GRPO,
    ),
    Claim(
        "grpo_collapses",
        "With GRPO instead of PPO, DGPO collapses early.",
        "section 5.7 (1), figure 6",
        Trains("dgpo_grpo", ("collapsed",)),
    ),
    Claim(
        "no_cold_start_collapses",
        "Without the cold start, DGPO collapses.",
        "section 5.6 and 5.7 (2), figure 6",
        Trains("no_cold_start", ("collapsed",)),
    ),
    Claim(
        "no_cold_start_outlasts_ppo",
        "Without the cold start, DGPO stays stable longer than PPO.",
        "section 5.7 (2), figure 6",
        Outlasts("no_cold_start", "ppo"),
    ),
    Claim(
        "kd_prevents_collapse",
        "The KD start is what prevents the collapse.",
        "section 5.6",
        both(Trains("dgpo", ("stable",)), Trains("no_cold_start", ("collapsed",))),
    ),
    Claim(
        "gkd_stable_but_worse",
        "Teacher guidance alone (GKD) is stable, but worse than DGPO.",
        "section 5.7 (3), figure 6",
        both(Trains("gkd", ("stable",)), beats("dgpo", "gkd")),
    ),
    Claim(
        "kd_gkd_collapses",
        "KD followed by GKD collapses.",
        "section 5.7 (4), figure 6",
        Trains("kd_gkd", ("collapsed",)),
    ),
)

ARCAP = (
    Claim(
        "source_nq_dgpo_best",
        "Source referencing, one context: DGPO is the best student.",
        "section 5.3, table 5",
        beats_all("dgpo", ("student", "ppo", "kd"), "source_em_nq"),
    ),
    Claim(
        "source_musique_kd_best",
        "Source referencing, several contexts: KD is the best student.",
        "section 5.3, table 5",
        beats_all("kd", ("student", "ppo", "dgpo"), "source_em_musique"),
    ),
    Claim(
        "query_ppo_best",
        "Query rewriting: PPO is the best, above the teacher.",
        "section 5.4, table 5",
        beats_all("ppo", ("teacher", "kd", "dgpo"), "query_hit_nq"),
    ),
    Claim(
        "query_dgpo_over_kd",
        "Query rewriting: DGPO is better than KD.",
        "section 5.4, table 5",
        beats("dgpo", "kd", "query_hit_nq"),
    ),
    Claim(
        "query_dgpo_like_teacher",
        f"Query rewriting: DGPO is similar to the teacher (within {SIMILAR}).",
        "section 5.4, table 5",
        Contrast(
            ((1.0, "dgpo", "query_hit_nq"), (-1.0, "teacher", "query_hit_nq")), above=-SIMILAR, below=SIMILAR
        ),
    ),
    Claim(
        "thinking_hurts_musique",
        "Thinking lowers source referencing on several contexts, for every model.",
        "section 5.5, table 5",
        both(*(thinking_adds(model, "musique", -1.0) for model in PROFILED)),
    ),
    Claim(
        "thinking_hurts_teacher",
        "Thinking lowers the teacher's source referencing on both sets.",
        "section 5.5, table 5",
        both(*(thinking_adds("teacher", role, -1.0) for role in ("nq", "musique"))),
    ),
    Claim(
        "thinking_helps_rl",
        "Thinking raises source referencing on one context for the RL models.",
        "section 5.5, table 5 (its KD rises too, by 0.004)",
        both(*(thinking_adds(model, "nq") for model in ("ppo", "dgpo"))),
    ),
    Claim(
        "final_hit_dgpo_best",
        "Thinking, several hops: DGPO finds the most of all students.",
        "section 5.5, table 5",
        beats_all("dgpo", ("student", "ppo", "kd"), "thinking_hit_musique"),
    ),
    Claim(
        "distilled_search_more",
        "Distilled models search more than PPO does.",
        "section 5.5, table 5",
        both(*(beats(model, "ppo", "thinking_searches_musique") for model in ("kd", "dgpo"))),
    ),
    Claim(
        "dgpo_searches_more_than_teacher",
        "DGPO makes up for its size by searching more than the teacher.",
        "section 5.5, table 5",
        beats("dgpo", "teacher", "thinking_searches_musique"),
    ),
)

GROUPS = (
    ("Main results", OVERALL),
    ("Components", COMPONENTS),
    ("Training", DYNAMICS),
    ("ARCap", ARCAP),
    ("Other models", OTHER_PAIRS),
)
CLAIMS = tuple(claim for _, claims in GROUPS for claim in claims)
