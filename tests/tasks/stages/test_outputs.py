"""Tables for DVC and the report."""

from pathlib import Path

from dgpo_core.reporting.curves import read_curves
from tasks.stages.outputs import write_curves


def test_curves_are_read_as_they_were_written(tmp_path: Path) -> None:
    """A set's name may have a comma in it; a column that a row lacks is empty."""
    write_curves(tmp_path / "distill-kd.csv", [{"step": 1, "loss": 0.25}, {"step": 2, "em/a, b": 0.5}])
    assert (tmp_path / "distill-kd.csv").read_text() == 'step,loss,"em/a, b"\n1,0.25,\n2,,0.5\n'
    (curve,) = read_curves(tmp_path)
    assert curve.columns == {"loss": [(1, 0.25)], "em/a, b": [(2, 0.5)]}
