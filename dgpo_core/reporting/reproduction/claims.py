"""The paper's claims as data: what it says, where, and which condition on our numbers would agree.

`Contrast` quantities are `average` (EM over the data sets), a data set of the paper's (EM), or a measurement
of ARCap. The margins (`SIMILAR`, `APPROACHING`, near zero) are ours: the paper gives none.
"""

from dataclasses import dataclass

from dgpo_core.reporting.reproduction.conditions import (
    INFINITY,
    AtLeast,
    Condition,
    Contrast,
    ConvergesFaster,
    Outlasts,
    Trains,
    Untested,
    beats,
    beats_all,
    both,
    thinking_adds,
)
from dgpo_core.reporting.reproduction.stability import NEAR_ZERO
from dgpo_core.reporting.results import AVERAGE
from dgpo_core.reporting.words import PAPER_DATASETS

SIMILAR = 0.05  # two shares are similar when the interval of their difference stays within this
APPROACHING = 0.9  # of the teacher's EM; the paper's own share is 0.329 / 0.353 = 0.93


@dataclass(frozen=True)
class Claim:
    name: str
    statement: str
    source: str
    condition: Condition
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
