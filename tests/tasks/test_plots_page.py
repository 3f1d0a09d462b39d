"""`dvc plots show` with the project's own template: drawn by a browser without network."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, browse
from tests.conftest import ROOT


@pytest.fixture
def plots(dvc_repository: Path) -> Path:
    """The page of two plots, one with a value that is missing."""
    for name in ("config", "plots.html"):
        shutil.copy(ROOT / ".dvc" / name, Path(".dvc") / name)
    Path("a.csv").write_text("step,loss\n1,3.5\n2,\n3,1e-5\n")
    Path("b.csv").write_text("step,em\n1,0.5\n2,0.5\n")
    drawn = [{"a.csv": {"x": "step", "y": "loss", "title": "Loss"}}, {"b.csv": {"x": "step", "y": "em"}}]
    Path("dvc.yaml").write_text(json.dumps({"plots": drawn}))
    command = [sys.executable, "-m", "dvc", "plots", "show", "--out", "page"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return dvc_repository / "page" / "index.html"


def test_the_page_asks_nothing_of_the_network(plots: Path) -> None:
    page = plots.read_text()
    assert page.count("vegaEmbed('#") == 2 and "src=" not in page and "@import" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_draws_it(plots: Path, tmp_path: Path) -> None:
    with browse(tmp_path / "chromium") as page:
        page.open(plots.as_uri())
        lines = page.evaluate(
            "[...document.querySelectorAll('path[fill=none]')].map(p => p.getAttribute('d'))"
        )
        assert len(lines) == 2 and all("NaN" not in line for line in lines)
        assert [line.count("L") for line in lines] == [1, 1]
        assert "Loss" in page.evaluate("document.body.textContent")
        assert not page.errors
