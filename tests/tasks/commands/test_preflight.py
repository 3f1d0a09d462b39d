"""What is refused before the first stage."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

from dgpo_core.config.params import resolve_profile
from dgpo_core.errors import UserError
from tasks.commands.preflight import preflight
from tasks.project.paths import CORRECT_EPISODES, DISTRIBUTIONS, INDEX, QUESTIONS, TEACHER_EPISODES
from tasks.stages.distill import distill
from tasks.stages.teach import teach
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


def test_vocabularies_matter_to_whoever_imitates_the_teacher(workplace: Path) -> None:
    """Be it by its token ids alone (SeqKD); not to PPO, which has nothing of the teacher."""
    make_project(workplace, recipes=["ppo"])
    other_vocabulary(workplace)
    preflight()
    params = resolve_profile(ROOT / "profiles/tiny.yaml", ["sft_ppo"])
    (workplace / "params.yaml").write_text(yaml.safe_dump(params))
    for name in (TEACHER_EPISODES, CORRECT_EPISODES, DISTRIBUTIONS, INDEX, QUESTIONS):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    for check in (preflight, partial(distill, "seqkd")):
        with pytest.raises(UserError, match="different tokenizers"):
            check()


def test_the_teacher_does_not_begin_with_another_vocabulary(workplace: Path) -> None:
    """Of a model from elsewhere; whether one of ours has been built by then is open."""
    make_project(workplace, models={"student": "elsewhere/student"})
    other_vocabulary(workplace)
    shutil.copytree(ROOT / "models/student", workplace / "elsewhere/student")
    for name in (INDEX, QUESTIONS):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    with pytest.raises(UserError, match="different tokenizers"):
        teach()


def test_models_of_the_hubs_cache_are_compared(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(workplace, models={"teacher": "somebody/some-model"})
    other_vocabulary(workplace)
    cache = workplace / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--somebody--some-model"
    shutil.copytree(workplace / "models/teacher", repository / "snapshots/123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("123")
    with pytest.raises(UserError, match="different tokenizers"):
        preflight()


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "./nothing"])
def test_what_is_no_model_is_left_to_its_stage(workplace: Path, name: str) -> None:
    """Its error names the setting; these are no names of the hub."""
    make_project(workplace, models={"teacher": name})
    preflight()


def test_models_on_the_hub_are_left_to_their_stages(workplace: Path) -> None:
    make_project(workplace, models={"teacher": "somebody/some-model"})
    other_vocabulary(workplace)
    preflight()
    (workplace / "somebody").mkdir()
    (workplace / "models/teacher").rename(workplace / "somebody/some-model")
    with pytest.raises(UserError, match="different tokenizers"):  # a folder of that name is not the hub
        preflight()
