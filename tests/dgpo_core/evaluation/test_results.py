"""The numbers of the JSON files, and two models' comparison, against computations made in another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dgpo_core.errors import UserError
from dgpo_core.evaluation.comparison import compare
from dgpo_core.evaluation.diagnosis import Failure
from dgpo_core.evaluation.results import (
    MEASUREMENTS,
    comparisons,
    hacking_comparisons,
    leaders,
    read_scores,
)
from dgpo_core.evaluation.statistics import RESAMPLES, SEED, mean_of_means, paired_difference
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


def test_comparisons_pair_the_questions_that_failed_for_neither(reported: Reported) -> None:
    run, out = reported
    found = load(out, "comparisons.json")
    assert list(found) == ["dgpo-kd", "kd-student", "teacher-dgpo"]
    for pair, entry in found.items():
        first, second = (
            {(row["dataset"], row["question_id"]): row for row in run.rows[model]}
            for model in pair.split("-")
        )
        differences: dict[str, list[float]] = {name: [] for name in MIRRORS}
        for key in first:
            if "failed" not in (first[key]["outcome"], second[key]["outcome"]):
                differences[key[0]].append(float(first[key]["em"]) - float(second[key]["em"]))
        assert entry["n"] == sum(map(len, differences.values()))
        assert entry["mean"] == pytest.approx(np.mean([np.mean(d) for d in differences.values()]), abs=1e-6)
        for name, own in entry["datasets"].items():
            assert own["mean"] == pytest.approx(np.mean(differences[name]), abs=1e-6)
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    assert found["dgpo-kd"]["n"] == 10 * len(MIRRORS)


def test_a_model_leads_where_a_paired_interval_tells_it_from_all_others(run: Run) -> None:
    """Of 12 questions a set KD has 4, DGPO these and 8 more, 1 or none; nobody has any of `hard`."""
    more = dict.fromkeys(MIRRORS, 12) | {"rare": 5, "comparison": 4, "hard": 0}
    for model in ("kd", "dgpo"):
        for number, row in enumerate(run.rows[model]):
            own = more[row["dataset"]] if model == "dgpo" else min(4, more[row["dataset"]])
            row["outcome"], row["em"] = "wrong", number % 12 < own
    run.save()
    scores = read_scores(run.folder / "evaluation", ["kd", "dgpo"], list(MIRRORS))
    clear = set(MIRRORS) - {"rare", "comparison", "hard"}
    assert leaders(scores, list(MIRRORS)) == dict.fromkeys([*clear, "average"], "dgpo")
    assert leaders({"kd": scores["kd"]}, list(MIRRORS)) == {}


def test_hacking_is_compared_over_the_questions_that_a_check_applies_to(run: Run) -> None:
    """KD guessed 1 of 20 correct answers, DGPO 12 of 30; of KD's searches nothing is known."""
    guessed = {"kd": [True] * 1 + [False] * 19, "dgpo": [True] * 12 + [False] * 18}
    for model, flags in guessed.items():
        for number, row in enumerate(run.diagnoses[model]):
            row |= {"outcome": "correct" if number < len(flags) else "wrong", "first_failure": None}
            row["without_evidence"] = flags[number] if number < len(flags) else None
            row["repeats_question"] = None if model == "kd" else False
    diagnoses = {m: {(r["dataset"], r["question_id"]): r for r in run.diagnoses[m]} for m in guessed}
    [found] = hacking_comparisons(diagnoses).values()
    assert found["without_evidence"]["mean"] == pytest.approx(12 / 30 - 1 / 20, abs=1e-6)
    assert found["without_evidence"]["ci95"][0] > 0 and found["without_evidence"]["n"] == 30
    assert set(found) == {"without_evidence", "several_answers"}


def test_models_of_no_named_pair_are_compared_with_their_neighbours(reported: Reported) -> None:
    run, _ = reported
    scores = read_scores(run.folder / "evaluation", MODELS, list(MIRRORS))
    mine = {"kd": scores["kd"], "mine": scores["dgpo"], "other": scores["teacher"]}
    assert list(comparisons(mine)) == ["mine-kd", "other-mine"]
    assert comparisons(mine)["mine-kd"] == comparisons(scores)["dgpo-kd"]


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


def compared(run: Run, first: str = "dgpo", second: str = "kd") -> dict[str, Any]:
    return compare(run.folder / "evaluation", first, second, list(MIRRORS))


def values(run: Run, column: str, dataset: str) -> tuple[list[float], list[float]]:
    """Of dgpo and kd: the questions of a data set that failed for neither."""
    ours, theirs = (
        {row["question_id"]: row for row in run.rows[model] if row["dataset"] == dataset}
        for model in ("dgpo", "kd")
    )
    both = [key for key in sorted(ours) if "failed" not in (ours[key]["outcome"], theirs[key]["outcome"])]
    return [float(ours[key][column]) for key in both], [float(theirs[key][column]) for key in both]


@pytest.mark.parametrize("column", ["em", "f1"])
def test_rows_are_paired_differences_of_what_failed_for_neither(reported: Reported, column: str) -> None:
    run, _ = reported
    found = compared(run)[column]
    differences = []
    for dataset in MIRRORS:
        ours, theirs = values(run, column, dataset)
        row, expected = found["datasets"][dataset], paired_difference(ours, theirs)
        differences.append(np.subtract(ours, theirs))
        assert row["n"] == len(ours) == 10
        assert [row["first"], row["second"]] == pytest.approx([np.mean(ours), np.mean(theirs)], abs=1e-6)
        assert [row["difference"], *row["ci95"]] == pytest.approx(
            [expected.mean, expected.low, expected.high], abs=1e-6
        )
    average, expected = found["average"], mean_of_means(differences, signed=True)
    assert [average["difference"], *average["ci95"]] == pytest.approx(
        [expected.mean, expected.low, expected.high], abs=1e-6
    )
    for row in [*found["datasets"].values(), average]:
        assert row["difference"] == pytest.approx(row["first"] - row["second"], abs=2e-6)
        assert row["excludes_zero"] == (row["ci95"][0] > 0 or row["ci95"][1] < 0)


@pytest.mark.parametrize("pair", ["dgpo-kd", "kd-student", "teacher-dgpo"])
def test_the_report_says_the_same_of_its_pairs(reported: Reported, pair: str) -> None:
    run, out = reported
    found = compared(run, *pair.split("-"))
    em, arcap = (
        json.loads((out / f"{name}.json").read_text())[pair] for name in ("comparisons", "arcap_comparisons")
    )
    same = {"mean": "difference", "ci95": "ci95", "n": "n"}
    assert {name: found["em"]["average"][key] for name, key in same.items()} | {
        "datasets": {
            dataset: {name: row[key] for name, key in same.items()}
            for dataset, row in found["em"]["datasets"].items()
        }
    } == em
    assert tuple(found["arcap"]) == MEASUREMENTS
    for measurement, row in found["arcap"].items():
        assert {name: row[key] for name, key in same.items()} == arcap[measurement]


def test_an_interval_without_0_is_marked_and_one_with_it_is_not(run: Run) -> None:
    for model, right in (("dgpo", range(10)), ("kd", range(5))):
        for number, row in enumerate(run.rows[model]):
            row["outcome"], row["em"] = "wrong", number % 12 in right
            row["f1"] = 0.25
    run.save()
    found = compared(run)
    assert found["em"]["average"]["difference"] == pytest.approx(5 / 12, abs=1e-6)
    assert found["em"]["average"]["excludes_zero"]
    assert found["f1"]["average"]["difference"] == 0 and not found["f1"]["average"]["excludes_zero"]


def test_a_set_that_failed_has_no_figures(run: Run) -> None:
    for row in run.rows["kd"]:
        if row["dataset"] == "hard":
            row["outcome"] = "failed"
    run.save()
    em = compared(run)["em"]
    nothing = {"first": None, "second": None, "difference": None, "ci95": [None, None], "n": 0}
    assert em["datasets"]["hard"] == em["average"] == nothing | {"excludes_zero": False}
    assert em["datasets"]["onehop"]["n"] == 10


def test_measurements_of_one_model_alone_are_left_out(run: Run) -> None:
    run.arcap["kd"] = [row for row in run.arcap["kd"] if row["measurement"] != "query_hit_nq"]
    run.save()
    assert set(MEASUREMENTS) - set(compared(run)["arcap"]) == {"query_hit_nq"}


def test_what_cannot_be_compared_is_said(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"'mine' is not evaluated; evaluated are dgpo, kd, student, teacher$"
    ):
        compared(run, "dgpo", "mine")
    with pytest.raises(UserError, match="'dgpo' is not evaluated; no model is"):
        compare(tmp_path / "nothing", "dgpo", "kd", list(MIRRORS))
    run.rows["kd"][3]["question_id"] = "another"
    run.save()
    with pytest.raises(UserError, match=r"kd/questions\.parquet: not the questions that dgpo was asked"):
        compared(run)
    run.rows["kd"] = run.rows["student"]
    run.arcap["kd"][3]["question_id"] = "another"
    run.save()
    with pytest.raises(UserError, match=r"kd/arcap\.parquet: .* not the questions that dgpo was asked"):
        compared(run)
