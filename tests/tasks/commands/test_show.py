"""The results table."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.errors import UserError
from tasks.commands.show import Results, load_results, markdown, show
from tasks.project.paths import METRICS


def scores(em: float) -> dict[str, Any]:
    return {"em": em, "f1": em, "sub_em": em, "n": 10, "ci95": [em - 0.1, em + 0.1]}


def test_rows_are_data_sets_and_average_is_last() -> None:
    results: Results = {
        "student": {"nq": scores(0.1), "average": {"em": 0.1}},
        "dgpo": {"nq": scores(0.5), "average": {"em": 0.45}, "hotpotqa": scores(0.4)},
    }
    assert markdown(results).splitlines() == [
        "| EM | student | dgpo |",
        "| --- | --- | --- |",
        "| nq | 0.100 (0.00-0.20) | 0.500 (0.40-0.60) |",
        "| hotpotqa | - | 0.400 (0.30-0.50) |",
        "| average | 0.100 | 0.450 |",
    ]


def test_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"dgpo": {"nq": scores(0.5)}}))
    show(path)
    assert "0.500" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"dgpo": 3}', '{"dgpo": {"nq": {"f1": 1}}}'])
def test_bad_results_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        load_results(path)


def test_no_results_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        load_results(tmp_path / "results.json")
    METRICS.mkdir()
    (METRICS / "evaluate-student.json").write_text("{}")
    with pytest.raises(UserError, match=r"compare: \[student\]` in params\.yaml, .*tasks\.stages\.report`"):
        load_results(tmp_path / "results.json")
