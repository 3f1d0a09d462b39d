"""Which model a reference means, and what is said when there is none."""

import os
import sys
import types
from pathlib import Path

import pytest

from dgpo_core.errors import UserError
from tasks.answering import CHAMPION, called, resolve_model
from tests.tasks.miniature import make_project


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tasks.registry", None)  # importing it raises ModuleNotFoundError
    make_project(tmp_path, ["kd", "dgpo"])
    return tmp_path


def trained(folder: Path, name: str, when: int) -> None:
    config = folder / "models" / name / "config.json"
    config.parent.mkdir()
    config.write_text("{}")
    os.utime(config, (when, when))


def registry(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    """A registry module that knows `folders`."""

    def model_folder(reference: str) -> Path:
        if reference not in folders:
            raise UserError(f"{reference}: no such alias")
        return folders[reference]

    made = types.ModuleType("tasks.registry")
    made.model_folder = model_folder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tasks.registry", made)


def test_names_folders_and_registered_models(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(project, "kd", 1)
    registry(monkeypatch, {"models:/search-agent/3": Path("elsewhere")})
    assert resolve_model("teacher") == "models/teacher"
    assert resolve_model("kd") == "models/kd"
    assert resolve_model(str(project / "models" / "kd")) == str(project / "models" / "kd")
    assert resolve_model("models:/search-agent/3") == "elsewhere"
    with pytest.raises(UserError, match="models:/search-agent/4: no such alias"):
        resolve_model("models:/search-agent/4")


def test_a_models_name_holds_no_path_of_this_machine(project: Path) -> None:
    trained(project, "kd", 1)
    assert called("models:/search-agent/3", "/somewhere/dgpo") == "models:/search-agent/3"
    assert called("kd", "models/kd") == called(None, "models/kd") == "kd"
    assert called(str(project / "models" / "kd"), str(project / "models" / "kd")) == "kd"


def test_by_default_the_champion(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(project, "kd", 1)
    registry(monkeypatch, {CHAMPION: Path("models/best")})
    assert resolve_model(None) == "models/best"


def test_without_a_champion_the_newest_recipe_and_a_word_about_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry(monkeypatch, {})
    trained(project, "kd", 100)
    trained(project, "dgpo", 50)
    trained(project, "no-recipe", 200)
    assert resolve_model(None) == "models/kd"
    said = capsys.readouterr().err
    assert said == f"model models/kd, the newest trained recipe ({CHAMPION}: no such alias)\n"


def test_what_there_is_not_is_said(project: Path) -> None:
    with pytest.raises(UserError, match="no champion and no trained recipe; run `make demo`"):
        resolve_model(None)
    with pytest.raises(UserError, match="dgpo is not trained yet; run `dvc repro evaluate@dgpo`"):
        resolve_model("dgpo")
    with pytest.raises(UserError, match="no such model: student, teacher, kd, dgpo, or models:/name@alias"):
        resolve_model("gpt")
    with pytest.raises(UserError, match="there is no model registry"):
        resolve_model("models:/search-agent/1")
