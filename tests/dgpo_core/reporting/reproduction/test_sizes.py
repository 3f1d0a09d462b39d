"""Pairs of models of several sizes in one table."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dgpo_core.errors import UserError
from dgpo_core.reporting.reproduction.sizes import parameter_counts, write_sizes
from tests.dgpo_core.reporting.reproduction.synthetic import coin, make_runs

LEVELS = {"student": 0.0, "teacher": 0.9, "kd": 0.4}


def reproduced(tmp_path: Path, profile: str, width: int) -> None:
    runs = make_runs(tmp_path / f"runs-{profile}", [0, 1], list(LEVELS), coin(LEVELS), coin(LEVELS))
    for root in runs.roots.values():
        folder = root / "models" / "student"
        folder.mkdir(parents=True)
        save_file({"a": np.zeros((width, 1000), np.float32)}, folder / "model-1.safetensors")
        save_file({"b": np.zeros(1000, np.float32)}, folder / "model-2.safetensors")
    runs.write(tmp_path / "reproduction" / profile, parameters=parameter_counts(runs.roots[0]))


def test_smallest_student_first_with_what_was_run(tmp_path: Path) -> None:
    reproduced(tmp_path, "large", 3999)
    reproduced(tmp_path, "small", 999)
    write_sizes(tmp_path / "reproduction")
    header, rule, *rows = (tmp_path / "reproduction/sizes.md").read_text().splitlines()
    assert header.count("|") == rule.count("|") == rows[0].count("|")
    assert [row.split(" | ")[0] for row in rows] == ["| small", "| large"]
    assert "| 1.00 M | not known | 0, 1 | **0.000** [0.000, " in rows[0] and "| 4.00 M |" in rows[1]
    assert "not run" in rows[0] and "paper 0.298" in rows[0]  # PPO; KD


def test_parameters_are_those_of_the_files(tmp_path: Path) -> None:
    assert parameter_counts(tmp_path) == {}
    folder = tmp_path / "models/teacher"
    folder.mkdir(parents=True)
    save_file({"a": np.zeros((3, 5)), "b": np.zeros(2)}, folder / "model.safetensors")
    assert parameter_counts(tmp_path) == {"teacher": 17}
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"teacher/model\.safetensors: not a safetensors file"):
        parameter_counts(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_tables_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/tables.json").write_text(text)
    with pytest.raises(UserError, match=r"x/tables\.json"):
        write_sizes(tmp_path)
