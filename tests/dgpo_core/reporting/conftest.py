from pathlib import Path

import pytest

from tests.dgpo_core.reporting.synthetic import Run, make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A saved run of its own, free to be spoiled."""
    made = make_run(tmp_path / "run")
    made.save()
    return made


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A saved run and the folder of its report; read only."""
    made = make_run(tmp_path_factory.mktemp("reported"))
    made.save()
    return made, made.report(made.folder / "reports")
