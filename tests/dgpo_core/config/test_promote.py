"""The section `promote`."""

from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import PromoteConfig, load_params, resolve_profile
from dgpo_core.errors import UserError
from tests.tasks.miniature import ROOT


def load(folder: Path, **promote: object) -> object:
    content = resolve_profile(ROOT / "profiles/tiny.yaml")
    content["promote"] |= promote
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return load_params(folder / "params.yaml").challenger


def test_the_challenger_is_the_last_compared_recipe_unless_named(tmp_path: Path) -> None:
    assert load(tmp_path) == "dgpo"
    assert load(tmp_path, recipe="kd") == "kd"


@pytest.mark.parametrize(
    ("promote", "message"),
    [
        ({"recipe": "ppo"}, "promote.recipe: there is no 'ppo'"),
        ({"margins": {"nq": 0.1}}, r"promote.margins: \['nq'\] are no test sets"),
        ({"margin": 0.0}, "promote.margin"),
        ({"max_hacking": 1.5}, "promote.max_hacking"),
    ],
)
def test_what_cannot_be(tmp_path: Path, promote: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, **promote)


def test_a_data_set_may_have_a_margin_of_its_own() -> None:
    config = PromoteConfig(margins={"hard": 0.2})
    assert (config.margin_of("hard"), config.margin_of("onehop")) == (0.2, config.margin)
