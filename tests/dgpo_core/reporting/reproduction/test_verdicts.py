"""Verdicts both ways, from made-up measurements, and the paper's own figures against its claims."""

from collections.abc import Mapping

import numpy as np
import pytest

from dgpo_core.config.params import paper_recipes
from dgpo_core.evaluation.results import AVERAGE
from dgpo_core.reporting.curves import Curve
from dgpo_core.reporting.paper import DEFAULT_PAIR, paper_figure, paper_pairs
from dgpo_core.reporting.reproduction.claims import (
    CLAIMS,
    CRITERIA,
    INFINITY,
    AtLeast,
    Claim,
    Contrast,
    ConvergesFaster,
    Criterion,
    Outlasts,
    State,
    Training,
    Trains,
    Untested,
    beats,
    beats_all,
    both,
)
from dgpo_core.reporting.reproduction.seeds import Samples, SeedResults
from dgpo_core.reporting.reproduction.verdicts import CriterionResult, Judge, trainings

SETS = {"onehop": "nq", "twohop": "hotpotqa"}
QUESTIONS = 50


def measured(**levels: list[float]) -> SeedResults:
    """From each model's share of right answers with each seed: both sets alike, easy questions first."""
    keys = [(name, str(number)) for name in SETS for number in range(QUESTIONS)]

    def values(shares: list[float]) -> Samples:
        right = [[float(number < share * QUESTIONS) for number in range(QUESTIONS)] * 2 for share in shares]
        return Samples(keys, np.array(right))

    seeds = len(next(iter(levels.values())))
    samples = {model: {AVERAGE: values(shares)} for model, shares in levels.items()}
    return SeedResults(list(range(seeds)), list(levels), SETS, samples, {})


def judge(source: SeedResults, states: Mapping[str, list[Training]], pair: str = DEFAULT_PAIR) -> Judge:
    return Judge(source, states, {model: (pair, model) for model in source.models})


def find(condition: Criterion, source: SeedResults, **states: list[Training]) -> CriterionResult:
    return judge(source, states).find(condition)


def ended(*states: State, step: int = 60) -> list[Training]:
    """Of 100 steps; converged halfway to `step`."""
    lost = {"collapsed": step}
    converged = {"never learned": None}
    return [Training(s, lost.get(s), 0.4, 0.1, 100, "", converged.get(s, step // 2)) for s in states]


@pytest.mark.parametrize(
    ("dgpo", "kd", "holds", "remark"),
    [
        ([0.6, 0.7, 0.6], [0.3, 0.4, 0.3], True, ""),
        ([0.3, 0.3, 0.3], [0.6, 0.6, 0.6], False, "the opposite"),
        ([0.40, 0.42, 0.40], [0.40, 0.40, 0.40], False, "no clear difference, the interval includes 0"),
        ([0.3, 0.9, 0.9], [0.4, 0.4, 0.4], False, "no clear difference, it holds with 2 of 3 seeds only"),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], False, "no clear difference, the interval includes 0"),
    ],
)
def test_contrast_needs_interval_and_every_seed(
    dgpo: list[float], kd: list[float], holds: bool, remark: str
) -> None:
    finding = find(beats("dgpo", "kd"), measured(dgpo=dgpo, kd=kd))
    assert (finding.holds, finding.remark) == (holds, remark)
    assert finding.label == "DGPO − KD · average EM"
    assert finding.numbers is not None
    differences = [a - b for a, b in zip(dgpo, kd, strict=True)]
    assert list(finding.numbers["seeds"].values()) == pytest.approx(differences)
    assert finding.numbers["mean"] == pytest.approx(np.mean(differences), abs=1e-6)
    assert finding.numbers["paper"] == pytest.approx(0.329 - 0.298)
    assert "paper +0.031" in finding.evidence


def test_single_data_set_by_the_papers_name_and_by_ours() -> None:
    source = measured(dgpo=[0.6], kd=[0.2])
    assert find(beats("dgpo", "kd", "nq"), source).holds is True
    by_role, by_name = source.of("dgpo", "nq"), source.of("dgpo", "onehop")
    assert by_role is not None
    assert by_name is not None
    assert by_role.keys == by_name.keys
    assert find(beats("dgpo", "kd", "musique"), source).holds is None


def test_similar_needs_the_whole_interval_inside() -> None:
    terms = ((1.0, "dgpo", "average"), (-1.0, "teacher", "average"))
    similar = Contrast(terms, above=-0.2, below=0.2)
    assert find(similar, measured(dgpo=[0.52, 0.5], teacher=[0.5, 0.5])).holds is True
    wide = find(similar, measured(dgpo=[0.68, 0.68], teacher=[0.5, 0.5]))
    assert (wide.holds, wide.remark) == (False, "no clear difference, the interval includes 0.2")
    assert find(similar, measured(dgpo=[0.9, 0.9], teacher=[0.5, 0.5])).remark == "the opposite"
    near_zero = Contrast(((1.0, "student", "average"),), above=-INFINITY, below=0.05)
    assert find(near_zero, measured(student=[0.0, 0.0])).holds is True


def test_weights() -> None:
    share = Contrast(((1.0, "dgpo", "average"), (-0.9, "teacher", "average")))
    finding = find(share, measured(dgpo=[0.8], teacher=[0.8]))
    assert finding.label == "DGPO − 0.9 × Teacher · average EM"
    assert finding.numbers is not None
    assert finding.numbers["mean"] == pytest.approx(0.08)


GOOD = {"dgpo": [0.9], "kd": [0.1], "ppo": [0.2], "taid": [0.88]}


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        (beats_all("dgpo", ("kd", "ppo")), True),
        (beats_all("dgpo", ("kd", "gkd")), None),  # the missing one may decide
        (beats_all("kd", ("dgpo", "gkd")), False),  # one counterexample is enough
        (AtLeast(1, (beats("dgpo", "kd"), beats("dgpo", "gkd"))), True),  # one example is enough
        (AtLeast(2, (beats("dgpo", "kd"), beats("kd", "ppo"), beats("dgpo", "gkd"))), None),
        (AtLeast(2, (beats("kd", "dgpo"), beats("kd", "ppo"), beats("dgpo", "gkd"))), False),
        (both(beats("dgpo", "kd"), Untested("no reason")), None),
    ],
)
def test_what_was_not_run_leaves_open_only_what_it_can_decide(condition: Criterion, holds: bool) -> None:
    assert find(condition, measured(**GOOD)).holds is holds


def test_evidence_of_a_group_says_once_what_its_parts_share() -> None:
    source = measured(**GOOD)
    text = find(beats_all("kd", ("dgpo", "ppo", "gkd")), source).evidence
    assert text == (
        "0 of 3 hold, 3 needed; not: KD − DGPO, KD − PPO · average EM; not tested: KD − GKD · average EM"
    )
    text = find(AtLeast(1, (beats("kd", "dgpo", "nq"), beats("kd", "dgpo", "hotpotqa"))), source).evidence
    assert text == "0 of 2 hold, 1 needed; not: KD − DGPO · EM, NQ; EM, HotpotQA"


def test_some_of_many_needs_wider_intervals_and_all_of_many_does_not() -> None:
    source = measured(**GOOD)
    levels = [
        [leaf.numbers["confidence"] for leaf in find(condition, source).leaves() if leaf.numbers]
        for condition in (
            AtLeast(1, (beats("dgpo", "kd"), beats("dgpo", "ppo"))),
            AtLeast(2, (beats("dgpo", "kd"), beats("dgpo", "ppo"))),
        )
    ]
    assert levels == [[0.975, 0.975], [0.95, 0.95]]


@pytest.mark.parametrize(
    ("states", "wanted", "holds", "remark"),
    [
        (ended("collapsed", "collapsed"), ("collapsed",), True, ""),
        (ended("stable", "stable"), ("collapsed",), False, ""),
        (ended("fell", "fell"), ("collapsed",), False, ""),
        (ended("collapsed", "stable"), ("collapsed",), False, "no clear difference, the seeds disagree"),
        (ended("collapsed", "never learned"), ("collapsed", "never learned"), True, ""),
    ],
)
def test_training_must_end_alike_with_every_seed(
    states: list[Training], wanted: tuple[State, ...], holds: bool, remark: str
) -> None:
    finding = find(Trains("ppo", wanted), measured(ppo=[0.1, 0.1]), ppo=states)
    assert (finding.holds, finding.remark) == (holds, remark)
    assert find(Trains("ppo", wanted), measured(ppo=[0.1, 0.1])).holds is None


def test_outlasting() -> None:
    source, both_run = measured(ppo=[0.1]), Outlasts("no_cold_start", "ppo")
    early, late = ended("collapsed", step=20), ended("collapsed", step=80)

    def holds(first: list[Training], second: list[Training]) -> bool | None:
        return find(both_run, source, no_cold_start=first, ppo=second).holds

    assert holds(late, early) is True
    assert holds(early, late) is False
    assert holds(ended("stable"), early) is True
    assert holds(ended("never learned"), early) is False
    assert holds(late, ended("stable")) is False
    assert find(both_run, source, ppo=early).holds is None


def test_converging_faster() -> None:
    source, test = measured(grpo=[0.1]), ConvergesFaster("grpo", "ppo")
    early, late, never = ended("collapsed", step=20), ended("stable", step=80), ended("never learned")
    for first, second in ((early, late), (late, early), (early, early), (early, never)):
        assert find(test, source, grpo=first, ppo=second).holds is (second is late)
    assert find(test, source, grpo=early, ppo=late).evidence == (
        "seed 0 converged at step 10 against converged at step 40"
    )
    assert find(test, source, grpo=early).holds is None


def test_grpo_from_the_raw_student_is_a_row_beside_the_papers_tables() -> None:
    claim = next(claim for claim in CLAIMS if claim.name == "grpo_less_stable_than_ppo")
    rows = paper_recipes(["ppo", "grpo"]).reinforce
    assert rows["grpo"] == rows["ppo"].model_copy(update={"algorithm": "grpo"})

    runs = {"grpo": ended("collapsed", step=20), "ppo": ended("collapsed", step=80)}
    without = judge(measured(ppo=[0.1]), {"ppo": runs["ppo"]}).verdict(claim)
    assert without["verdict"] == "not tested" and "not tested: PPO outlasts GRPO" in without["evidence"]
    both_run = measured(ppo=[0.1], grpo=[0.1])
    assert judge(both_run, runs).verdict(claim)["verdict"] == "reproduced at our scale"
    swapped = {"grpo": runs["ppo"], "ppo": runs["grpo"]}
    assert judge(both_run, swapped).verdict(claim)["verdict"] == "not reproduced"


def test_recipe_counts_as_trained_only_with_a_curve_of_em_for_every_seed() -> None:
    em = Curve("", "ppo", {"em": [(1.0, 0.2), (2.0, 0.3)]})
    source = measured(ppo=[0.1, 0.1], gkd=[0.1, 0.1])
    source.curves.update(ppo=[em, em], gkd=[em, Curve("", "gkd", {"loss": [(1.0, 1.0)]})])
    assert list(trainings(source)) == ["ppo"]


def test_claim_about_other_models_is_not_tested_unless_they_were_run() -> None:
    source = measured(dgpo=[0.9], kd=[0.1], ppo=[0.1])
    claim = next(claim for claim in CLAIMS if claim.pair == "llama3-8b-to-1b")
    for pair, verdict in ((DEFAULT_PAIR, "not tested"), (claim.pair, "reproduced at our scale")):
        assert judge(source, {}, pair).verdict(claim, pair)["verdict"] == verdict


def test_names_are_unique_sources_given_and_pairs_known() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert {claim.name for claim in CLAIMS} == set(CRITERIA)
    assert all(claim.source and claim.statement.endswith(".") for claim in CLAIMS)
    assert {claim.pair for claim in CLAIMS} <= {"", *paper_pairs()}


def agrees(condition: Criterion, pair: str) -> bool | None:
    """Do the paper's own point figures fulfil the condition? None where it gives no such figure."""
    match condition:
        case Contrast():
            figures = [
                (weight, paper_figure(pair, model, quantity)) for weight, model, quantity in condition.terms
            ]
            if any(own is None for _, own in figures):
                return None
            return condition.above < sum(w * own for w, own in figures if own is not None) < condition.below
        case AtLeast():
            parts = [agrees(part, pair) for part in condition.parts]
            if sum(part is True for part in parts) >= condition.count:
                return True
            return None if None in parts else False
        case _:
            return None


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_the_papers_own_figures_never_contradict_its_claim(claim: Claim) -> None:
    """A condition that the paper itself does not fulfil would be our misreading."""
    assert agrees(claim.criterion, claim.pair or DEFAULT_PAIR) is not False
