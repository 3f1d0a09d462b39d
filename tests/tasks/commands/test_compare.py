"""`dgpo compare`, run as its users run it, on a made-up run."""

import json
from pathlib import Path

import pytest

from tests.dgpo_core.reporting.synthetic import make_run
from tests.tasks.commands.test_cli import dgpo
from tests.tasks.miniature import make_project


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    make_project(folder)
    make_run(folder).save()
    return folder


def test_the_table_has_both_models_and_marks_clear_differences(evaluated: Path) -> None:
    found = json.loads(dgpo(evaluated, "compare", "teacher", "student", "--json").stdout)
    assert found["models"] == ["teacher", "student"]
    done = dgpo(evaluated, "compare", "teacher", "student")
    assert done.returncode == 0, done.stderr
    lines = {tuple(cells[1:2]): cells for cells in map(_cells, done.stdout.splitlines()) if len(cells) > 1}
    em, searches = found["em"]["average"], found["arcap"]["thinking_searches_nq"]
    low, high = em["ci95"]
    assert em["excludes_zero"] and not searches["excludes_zero"]
    assert lines[("EM average",)][2:-1] == [
        *(f"{em[name]:.3f}" for name in ("first", "second")),
        f"{em['difference']:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        "*",
        "84",
    ]
    assert lines[("thinking_searches_nq",)][-3:-1] == ["", "11"]
    early = found["search_use"]["answered_too_early"]
    assert lines[("Answered too early",)][2:4] == [f"{early[name]:.3f}" for name in ("first", "second")]
    assert len([name for (name,) in lines if name.startswith(("EM ", "F1 "))]) == 2 * (7 + 1)


def test_a_model_that_was_not_evaluated_is_one_line(evaluated: Path) -> None:
    done = dgpo(evaluated, "compare", "kd", "mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == (
        "error: evaluation/mine: 'mine' is not evaluated; evaluated are dgpo, kd, student, teacher"
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").split("│")]
