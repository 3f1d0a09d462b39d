import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgpo_core.errors import UserError
from dgpo_core.reporting.curves import Curve, figures, read_curves, smoothed, thinned


def write(folder: Path, text: str, name: str = "reinforce-dgpo.csv") -> Path:
    (folder / name).write_text(text)
    return folder


def test_gaps_nan_and_infinities_are_left_out(tmp_path: Path) -> None:
    [curve] = read_curves(write(tmp_path, "step,em,dev_em,kl\n1,0.1,,nan\n2,0.2,0.5,inf\n"))
    assert (curve.stage, curve.recipe) == ("reinforce", "dgpo")
    assert curve.columns == {"em": [(1, 0.1), (2, 0.2)], "dev_em": [(2, 0.5)]}


def test_recipe_may_contain_hyphens_and_files_come_by_name(tmp_path: Path) -> None:
    for name in ("reinforce-a-b.csv", "distill-kd.csv"):
        write(tmp_path, "step,loss\n1,2\n", name)
    assert [(curve.stage, curve.recipe) for curve in read_curves(tmp_path)] == [
        ("distill", "kd"),
        ("reinforce", "a-b"),
    ]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("epoch,loss\n1,2\n", "a column step"),
        ("step,loss\n1,2\n2,high\n", "line 3: 'high'"),
        ("step,loss\n1,2,3\n", "line 2"),
        ("step,loss\n1\n", "line 2"),
        ("step,loss\n,2\n", "line 2: no step"),
    ],
)
def test_malformed_table_names_file_and_line(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(UserError, match=rf"reinforce-dgpo\.csv.*{where}"):
        read_curves(write(tmp_path, text))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_curves(tmp_path / "nowhere")


def test_em_and_held_out_share_a_panel_and_unknown_columns_come_last() -> None:
    points = [(float(step), 0.5) for step in range(100)]
    curve = Curve("reinforce", "dgpo", {"zeal": points, "dev_em": points[:3], "em": points, "reward": points})
    found = figures(curve)
    assert [figure["title"] for figure in found] == ["Exact match", "Reward", "zeal"]
    assert [trace["role"] for trace in found[0]["traces"]] == ["raw", "trend", "points"]


Values = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300)


@given(Values, st.integers(1, 50))
def test_thinning_keeps_the_limit_and_the_last_step(values: list[float], limit: int) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    found = thinned(points, limit)
    assert len(found) <= limit
    assert found[-1][0] == points[-1][0]
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    if len(values) <= limit:
        assert found == points


@given(Values)
def test_trend_has_every_step_and_stays_in_range(values: list[float]) -> None:
    found = smoothed([(float(step), value) for step, value in enumerate(values)])
    assert len(found) == len(values)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert all(min(values) - slack <= value <= max(values) + slack for _, value in found)
    assert all(math.isfinite(value) for _, value in found)
