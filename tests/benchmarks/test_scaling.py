"""Fitted exponents of sizes, and the points that they are fitted to."""

import pytest

from benchmarks import training_step as step
from benchmarks.scaling import CURVES, exponent, measure, table


def test_the_exponent_of_a_power_is_found() -> None:
    points = [{"size": n, "seconds": 3.0 * n**1.5, "memory": 5.0} for n in (1, 2, 4, 8)]
    assert exponent(points, "seconds") == pytest.approx((1.5, 0.0), abs=1e-6)
    assert exponent(points, "memory", least=10.0) is None, "what is too small to be seen says nothing"


def test_an_update_has_the_plan_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EPISODES", "LENGTH", "COUNTED"):  # a point has a process of its own, else
        monkeypatch.setattr(step, name, getattr(step, name))
    curve = next(curve for curve in CURVES if curve.over == "vocabulary")
    points = [measure(curve, 500), measure(curve, 1000), measure(curve, 2000)]
    assert all(point["seconds"] > 0 and point["planned"] > 0 for point in points)
    assert points[0]["flops"] < points[1]["flops"] < points[2]["flops"]
    cells = table({curve: [point | {"memory": 1e9} for point in points]}).splitlines()[2].split("|")
    assert cells[2].strip() == "vocabulary" and cells[3].strip() == "500 to 2,000"
