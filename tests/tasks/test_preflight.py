"""What is refused before the first stage."""

import json
import shutil
from pathlib import Path

import pytest

from dgpo_core.errors import UserError
from tasks.preflight import preflight
from tests.tasks.miniature import ROOT, make_project


def other_vocabulary(folder: Path) -> None:
    """Give the project's teacher a tokenizer in which two ids are exchanged."""
    teacher = folder / "models/teacher"
    teacher.unlink()
    shutil.copytree(ROOT / "models/teacher", teacher)
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (100, 101)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (teacher / "tokenizer.json").write_text(json.dumps(content))


def test_incompatible_vocabularies(workplace: Path) -> None:
    make_project(workplace)
    preflight()
    other_vocabulary(workplace)
    with pytest.raises(UserError, match=r"models: student and teacher have different tokenizers.* id 100"):
        preflight()


def test_vocabularies_do_not_matter_without_the_teachers_distributions(workplace: Path) -> None:
    make_project(workplace, recipes=["sft_ppo"])
    other_vocabulary(workplace)
    preflight()
    (workplace / "params.yaml").write_text((ROOT / "params.yaml").read_text())  # with KD and DGPO
    with pytest.raises(UserError, match="different tokenizers"):
        preflight()


def test_models_on_the_hub_are_left_to_their_stages(workplace: Path) -> None:
    make_project(workplace, models={"teacher": "somebody/some-model"})
    other_vocabulary(workplace)
    preflight()
    (workplace / "somebody").mkdir()
    (workplace / "models/teacher").rename(workplace / "somebody/some-model")
    with pytest.raises(UserError, match="different tokenizers"):  # a folder of that name is not the hub
        preflight()
