"""Two models' paired comparison against the report's tables and computations made in another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dgpo_core.errors import UserError
from dgpo_core.evaluation.results import MEASUREMENTS, compare
from dgpo_core.evaluation.statistics import mean_of_means, paired_difference
from tests.dgpo_core.reporting.synthetic import MIRRORS, Run

Reported = tuple[Run, Path]


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
    for row in [*found["datasets"].values(), average, found["pooled"]]:
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
    assert {name: found["em"]["pooled"][key] for name, key in same.items()} == em
    assert tuple(found["arcap"]) == MEASUREMENTS
    for measurement, row in found["arcap"].items():
        assert {name: row[key] for name, key in same.items()} == arcap[measurement]


def test_turned_round_only_the_sign_changes(reported: Reported) -> None:
    run, _ = reported
    there, back = compared(run)["em"]["datasets"], compared(run, "kd", "dgpo")["em"]["datasets"]
    for dataset, row in there.items():
        assert back[dataset]["difference"] == -row["difference"]
        assert (back[dataset]["first"], back[dataset]["second"]) == (row["second"], row["first"])


def test_an_interval_without_0_is_marked_and_one_with_it_is_not(run: Run) -> None:
    for model, right in (("dgpo", range(10)), ("kd", range(5))):
        for number, row in enumerate(run.rows[model]):
            row["outcome"], row["em"] = "wrong", number % 12 in right
            row["f1"] = 0.25
    run.save()
    found = compared(run)
    assert found["em"]["pooled"]["difference"] == pytest.approx(5 / 12, abs=1e-6)
    assert found["em"]["pooled"]["excludes_zero"] and found["em"]["average"]["excludes_zero"]
    assert found["f1"]["average"]["difference"] == 0 and not found["f1"]["average"]["excludes_zero"]


def test_a_set_that_failed_has_no_figures(run: Run) -> None:
    for row in run.rows["kd"]:
        if row["dataset"] == "hard":
            row["outcome"] = "failed"
    run.save()
    em = compared(run)["em"]
    nothing = {"first": None, "second": None, "difference": None, "ci95": [None, None], "n": 0}
    assert em["datasets"]["hard"] == em["average"] == nothing | {"excludes_zero": False}
    assert em["pooled"]["n"] == 60


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
