"""Which model a reference means, and what is said when there is none; on a real registry."""

import shutil
from pathlib import Path

import pytest

from dgpo_core.config.params import load_params
from dgpo_core.errors import UserError
from tasks.commands.agent import CHAMPION, model_name, resolve_model
from tasks.commands.promote import promote
from tasks.project.files import content_hash
from tasks.tracking.evaluations import register_trained
from tests.tasks.miniature import make_project
from tests.tasks.trained import make_trained


def trained(name: str) -> None:
    config = Path("models") / name / "config.json"
    config.parent.mkdir()
    config.write_text("{}")


@pytest.fixture
def nothing_trained(own_store: Path) -> Path:
    make_project(own_store, ["kd", "dgpo"])
    return own_store


def test_names_and_folders(nothing_trained: Path) -> None:
    trained("kd")
    assert resolve_model(load_params(), "teacher") == "models/teacher"
    assert resolve_model(load_params(), "kd") == "models/kd"
    assert resolve_model(load_params(), str(Path("models/kd").resolve())) == str(Path("models/kd").resolve())


def test_registered_models_and_the_champion_by_default(own_store: Path) -> None:
    make_trained(own_store)
    register_trained()
    with pytest.raises(UserError, match=r"search-agent.*champion"):
        resolve_model(load_params(), CHAMPION)
    assert promote("1", dry_run=False, yes=True) == 0
    champion = content_hash(Path(resolve_model(load_params(), "models:/search-agent/1")))
    assert content_hash(Path(resolve_model(load_params(), CHAMPION))) == champion
    assert content_hash(Path(resolve_model(load_params(), None))) == champion
    with pytest.raises(UserError, match="search-agent has no version 9; there are: 1, 2"):
        resolve_model(load_params(), "models:/search-agent/9")


def test_a_models_name_holds_no_path_of_this_machine(nothing_trained: Path) -> None:
    trained("kd")
    assert model_name("models:/search-agent/3", "/somewhere/dgpo") == "models:/search-agent/3"
    assert model_name("kd", "models/kd") == model_name(None, "models/kd") == "kd"
    assert model_name(str(Path("models/kd").resolve()), str(Path("models/kd").resolve())) == "kd"


def test_without_a_champion_the_last_trained_recipe_and_a_word_about_it(
    nothing_trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("kd")
    assert resolve_model(load_params(), None) == "models/kd"
    trained("dgpo")
    trained("no-recipe")
    capsys.readouterr()
    assert resolve_model(load_params(), None) == "models/dgpo"
    said = capsys.readouterr().err
    assert "model models/dgpo, the last trained recipe of params.yaml (" in said and "champion" in said


def test_what_there_is_not_is_said(nothing_trained: Path) -> None:
    with pytest.raises(UserError, match="no champion and no trained recipe; run `make demo`"):
        resolve_model(load_params(), None)
    with pytest.raises(UserError, match="dgpo is not trained yet; run `dvc repro evaluate@dgpo`"):
        resolve_model(load_params(), "dgpo")
    with pytest.raises(UserError, match="no such model: student, teacher, kd, dgpo, or models:/name@alias"):
        resolve_model(load_params(), "gpt")
    shutil.rmtree("models")
    with pytest.raises(UserError):
        resolve_model(load_params(), "kd")
