"""Tables of the use of search of a made-up run, against sums written out."""

from collections.abc import Callable
from typing import Any

import pytest

from dgpo_core.errors import UserError
from dgpo_core.evaluation.comparison import compare
from dgpo_core.evaluation.results import Key
from dgpo_core.evaluation.search_use import MEASUREMENTS, OF_SEARCH
from dgpo_core.evaluation.search_use_tables import (
    Counted,
    read_search_use,
    search_use,
    search_use_comparisons,
)
from tests.dgpo_core.reporting.synthetic import MIRRORS, MODELS, Row, Run


def read(run: Run, keys: list[Key] | None = None) -> dict[str, dict[str, Counted]]:
    asked = [(row["dataset"], row["question_id"]) for row in run.rows["kd"]]
    return read_search_use(run.folder / "evaluation", MODELS, keys or asked)


def total(rows: list[Row], name: str, leave_out: set[str]) -> tuple[float, int]:
    mine = [row for row in rows if row["measurement"] == name and row["question_id"] not in leave_out]
    occasions = sum(row["occasions"] for row in mine)
    return sum(row["events"] for row in mine) / occasions, occasions


def lost(run: Run, *models: str) -> set[str]:
    return {row["question_id"] for model in models for row in run.counts[model] if row["failed"]}


def test_shares_are_sums_over_what_did_not_fail(run: Run) -> None:
    found = search_use(read(run))
    assert lost(run, "kd") and not lost(run, "teacher")
    for model in MODELS:
        assert tuple(found[model]) == MEASUREMENTS
        for name, entry in found[model].items():
            mean, occasions = total(run.counts[model], name, lost(run, model))
            assert (entry["mean"], entry["occasions"]) == (pytest.approx(mean, abs=1e-6), occasions)
            assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
            assert entry["failed"] == len(lost(run, model))


def test_differences_are_over_what_failed_for_neither(run: Run) -> None:
    found = search_use_comparisons(read(run))
    assert list(found) == ["dgpo-kd", "kd-student", "teacher-dgpo"]
    compared = compare(run.folder / "evaluation", "dgpo", "kd", list(MIRRORS))["search_use"]
    out = lost(run, "dgpo", "kd")
    for name in MEASUREMENTS:
        means = [total(run.counts[model], name, out)[0] for model in ("dgpo", "kd")]
        row, entry = compared[name], found["dgpo-kd"][name]
        assert [row["first"], row["second"]] == pytest.approx(means, abs=1e-6)
        assert entry == {"mean": row["difference"], "ci95": row["ci95"], "n": row["n"]}
        assert row["difference"] == pytest.approx(means[0] - means[1], abs=2e-6)
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]


def test_what_comes_of_search_may_be_nothing_either_way(run: Run) -> None:
    """Where search changed no answer, the interval lies on both sides of 0."""
    for row in run.counts["kd"]:
        row["events"] *= row["measurement"] != OF_SEARCH
    run.save()
    low, high = search_use(read(run))["kd"][OF_SEARCH]["ci95"]
    assert low == -high < 0


def test_only_the_asked_questions_count(run: Run) -> None:
    keys = [(row["dataset"], row["question_id"]) for row in run.rows["kd"]][:20]
    for own in read(run, keys)["dgpo"].values():
        assert own.keys == sorted(keys)


def test_models_of_before_have_no_counts(run: Run) -> None:
    (run.folder / "evaluation" / "kd" / "search_use.parquet").unlink()
    found = read(run)
    assert found["kd"] == {} and search_use_comparisons(found)["dgpo-kd"] == {}
    assert set(search_use_comparisons(found)["teacher-dgpo"]) == set(MEASUREMENTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(), "decisions_neither: not the questions that student was asked"),
        (lambda rows: rows.append(dict(rows[0])), "em_true_retriever: a question stands there twice"),
        (lambda rows: rows[0].update(measurement="cooking"), "unknown measurement: cooking"),
        (lambda rows: [row.pop("events") for row in rows], "lacks the columns events"),
    ],
)
def test_malformed_counts_are_refused(run: Run, change: Callable[[list[Row]], Any], message: str) -> None:
    change(run.counts["kd"])
    run.save()
    with pytest.raises(UserError, match=f"kd/search_use.parquet: .*{message}"):
        read(run)
