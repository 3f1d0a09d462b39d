"""The numbers of the JSON files against computations made in another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dgpo_core.evaluation.diagnosis import Failure
from dgpo_core.evaluation.results import MEASUREMENTS, comparisons, read_scores
from dgpo_core.evaluation.statistics import RESAMPLES, SEED, mean_of_means, mean_with_interval
from tests.dgpo_core.reporting.synthetic import MIRRORS, MODELS, Run

Reported = tuple[Run, Path]


def load(out: Path, name: str) -> Any:
    return json.loads((out / name).read_text())


def measured(run: Run, model: str, dataset: str, column: str) -> list[float]:
    rows = [row for row in run.rows[model] if row["dataset"] == dataset and row["outcome"] != "failed"]
    return [float(row[column]) for row in sorted(rows, key=lambda row: row["question_id"])]


@pytest.mark.parametrize("model", MODELS)
def test_means_are_those_of_the_rows_that_did_not_fail(reported: Reported, model: str) -> None:
    run, out = reported
    table = load(out, "results.json")[model]
    assert list(table) == [*MIRRORS, "average"]
    for column in ("em", "f1", "sub_em"):
        means = [float(np.mean(measured(run, model, dataset, column))) for dataset in MIRRORS]
        assert [table[dataset][column] for dataset in MIRRORS] == pytest.approx(means, abs=1e-6)
        assert table["average"][column] == pytest.approx(np.mean(means), abs=1e-6)


def test_only_the_first_questions_of_a_set_count(run: Run, tmp_path: Path) -> None:
    """As the paper's Bamboogle, of which 124 of 125 count; first in the file, not by id."""
    for model in MODELS:
        run.rows[model].reverse()
    run.save()
    run.report_with(tmp_path / "out", first={"hard": 5})
    hard = [row for row in run.rows["teacher"] if row["dataset"] == "hard"]
    results = load(tmp_path / "out", "results.json")["teacher"]
    assert results["hard"]["em"] == pytest.approx(np.mean([row["em"] for row in hard[:5]]))
    assert (results["hard"]["n"], results["onehop"]["n"]) == (5, 12)
    counts = load(tmp_path / "out", "diagnosis.json")["teacher"]["by_dataset"]["hard"]
    assert sum(counts.values()) == sum(row["outcome"] == "wrong" for row in hard[:5])


def test_failed_questions_are_counted_and_left_out(reported: Reported) -> None:
    _, out = reported
    results = load(out, "results.json")
    assert [results[model]["onehop"]["n"] for model in MODELS] == [12, 12, 11, 11]
    assert [results[model]["average"]["failed"] for model in MODELS] == [0, 0, len(MIRRORS), len(MIRRORS)]
    assert results["kd"]["average"]["n"] == 11 * len(MIRRORS)


def test_interval_of_a_data_set_is_scipys_percentile_bootstrap(reported: Reported) -> None:
    run, out = reported
    expected = stats.bootstrap(
        (measured(run, "dgpo", "twohop", "em"),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=500,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    found = load(out, "results.json")["dgpo"]["twohop"]["ci95"]
    assert found == pytest.approx([expected.low, expected.high], abs=1e-6)


def test_interval_of_the_average_resamples_each_data_set_by_itself() -> None:
    rng = np.random.default_rng(7)
    strata = [rng.integers(0, 2, size).astype(float) for size in (400, 20, 90)]
    estimate = mean_of_means(strata)
    draws = [np.mean([rng.choice(values, values.size).mean() for values in strata]) for _ in range(4000)]
    assert estimate.mean == pytest.approx(np.mean([values.mean() for values in strata]))
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.012)
    assert estimate.n == 510
    pooled = mean_with_interval(np.concatenate(strata))
    assert (
        estimate.high - estimate.low > pooled.high - pooled.low
    )  # the small set counts as much as the large


def test_average_of_constants_and_of_too_little() -> None:
    constant = mean_of_means([[1.0, 1.0], [0.0, 0.0, 0.0]])
    assert (constant.mean, constant.low, constant.high, constant.n) == (0.5, 0.5, 0.5, 5)
    assert np.isnan(mean_of_means([[1.0], [0.0, 1.0]]).low)
    for nothing in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="at least one value"):
            mean_of_means(nothing)


def test_comparisons_pair_the_questions_that_failed_for_neither(reported: Reported) -> None:
    run, out = reported
    found = load(out, "comparisons.json")
    assert list(found) == ["dgpo-kd", "kd-student", "teacher-dgpo"]
    for pair, entry in found.items():
        first, second = (
            {(row["dataset"], row["question_id"]): row for row in run.rows[model]}
            for model in pair.split("-")
        )
        differences = [
            float(first[key]["em"]) - float(second[key]["em"])
            for key in first
            if "failed" not in (first[key]["outcome"], second[key]["outcome"])
        ]
        assert entry["n"] == len(differences)
        assert entry["mean"] == pytest.approx(np.mean(differences), abs=1e-6)
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    assert found["dgpo-kd"]["n"] == 10 * len(MIRRORS)


def test_models_of_no_named_pair_are_compared_with_their_neighbours(reported: Reported) -> None:
    run, _ = reported
    scores = read_scores(run.folder / "evaluation", MODELS, list(MIRRORS))
    mine = {"kd": scores["kd"], "mine": scores["dgpo"], "other": scores["teacher"]}
    assert list(comparisons(mine)) == ["mine-kd", "other-mine"]
    assert comparisons(mine)["mine-kd"] == comparisons(scores)["dgpo-kd"]


def test_paired_difference_by_hand(run: Run) -> None:
    for model, right in (("dgpo", {0, 1, 2, 3, 4, 5}), ("kd", {4, 5, 6})):
        for number, row in enumerate(run.rows[model]):
            row["outcome"], row["em"] = "wrong", number in right
    run.save()
    entry = load(run.report(run.folder / "reports"), "comparisons.json")["dgpo-kd"]
    assert entry["mean"] == pytest.approx((4 - 1) / 84, abs=1e-6)
    assert entry["n"] == 84


def test_data_set_with_nothing_but_failures_has_no_mean(run: Run) -> None:
    for row in run.rows["kd"]:
        if row["dataset"] == "hard":
            row["outcome"] = "failed"
    run.save()
    table = load(run.report(run.folder / "reports"), "results.json")["kd"]
    assert (table["hard"]["em"], table["hard"]["n"], table["hard"]["ci95"]) == (None, 0, [None, None])
    assert table["average"]["em"] is None
    assert table["onehop"]["em"] is not None


def test_arcap_means_without_failed_rows(reported: Reported) -> None:
    run, out = reported
    table = load(out, "arcap.json")
    for model in MODELS:
        assert tuple(table[model]) == MEASUREMENTS
        for name, entry in table[model].items():
            values = [
                row["value"] for row in run.arcap[model] if row["measurement"] == name and not row["failed"]
            ]
            assert entry["mean"] == pytest.approx(np.mean(values), abs=1e-6)
            assert (entry["n"], entry["failed"]) == (11, 1)


def test_arcap_comparisons_pair_the_rows_that_failed_for_neither(run: Run) -> None:
    for row in run.arcap["kd"]:
        row["failed"] = row["question_id"] in ("q1", "q2")  # dgpo lost q0
    run.arcap["student"] = [row for row in run.arcap["student"] if row["measurement"] != "query_hit_nq"]
    run.save()
    found = load(run.report(run.folder / "reports"), "arcap_comparisons.json")
    assert list(found) == ["dgpo-kd", "kd-student", "teacher-dgpo"]
    assert tuple(found["dgpo-kd"]) == MEASUREMENTS
    assert set(MEASUREMENTS) - set(found["kd-student"]) == {"query_hit_nq"}
    ours, theirs = (
        {(row["measurement"], row["question_id"]): row["value"] for row in run.arcap[model]}
        for model in ("dgpo", "kd")
    )
    for name, entry in found["dgpo-kd"].items():
        differences = [ours[name, f"q{i}"] - theirs[name, f"q{i}"] for i in range(3, 12)]
        assert (entry["n"], entry["mean"]) == (9, pytest.approx(np.mean(differences), abs=1e-6))
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]


def test_first_failures_and_em_add_up_to_one(reported: Reported) -> None:
    run, out = reported
    results, diagnosis = load(out, "results.json"), load(out, "diagnosis.json")
    for model in MODELS:
        own = diagnosis[model]
        assert list(own["first_failures"]) == [str(failure) for failure in Failure]
        total = sum(entry["mean"] for entry in own["first_failures"].values())
        assert total + results[model]["average"]["em"] == pytest.approx(1, abs=1e-5)
        assert own["failed"] == results[model]["average"]["failed"]
        assert {entry["n"] for entry in own["first_failures"].values()} == {results[model]["average"]["n"]}
        for dataset, counts in own["by_dataset"].items():
            wrong = [row for row in run.rows[model] if (row["dataset"], row["outcome"]) == (dataset, "wrong")]
            assert sum(counts.values()) == len(wrong)


def test_hacking_shares_are_over_the_questions_that_a_check_applies_to(reported: Reported) -> None:
    run, out = reported
    diagnosis = load(out, "diagnosis.json")
    for model in MODELS:
        for check, entry in diagnosis[model]["hacking"].items():
            values = [row[check] for row in run.diagnoses[model] if row[check] is not None]
            assert (entry["n"], entry["mean"]) == (len(values), pytest.approx(np.mean(values), abs=1e-6))


def test_a_check_that_applies_to_nothing_has_no_share(run: Run) -> None:
    for row in run.diagnoses["student"]:
        row["without_evidence"] = None
    run.save()
    out = run.report(run.folder / "reports")
    entry = load(out, "diagnosis.json")["student"]["hacking"]["without_evidence"]
    assert entry == {"mean": None, "ci95": [None, None], "n": 0}
