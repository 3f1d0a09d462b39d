"""`dgpo rehearse`: the same stages as DVC's, and a whole rehearsal."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgpo_core.agent.episode import read_episodes
from dgpo_core.config.params import load_params, paper_recipes
from flows.dag import read_dag
from tasks.commands.rehearse import in_order, programs, rehearse
from tasks.project import paths
from tests.tasks.miniature import ROOT


def test_it_runs_the_stages_of_the_graph() -> None:
    graph = {name for name in read_dag(ROOT) if not name.startswith(("base-model@", "given@"))}
    params = load_params(ROOT / "params.yaml")
    # of the embedded world the rehearsal writes the data itself
    assert graph - {"data"} == {name for name, _ in programs(params)}
    published = params.model_copy(update={"data": params.data.model_copy(update={"source": "published"})})
    assert graph == {name for name, _ in programs(published)}


def test_recipes_come_after_those_that_they_start_from() -> None:
    recipes = paper_recipes(["all"])
    order = in_order(recipes)
    assert sorted(order) == sorted(recipes.all)
    for name, row in recipes.all.items():
        assert row.start == "student" or order.index(row.start) < order.index(name)


@pytest.mark.slow
def test_the_papers_profile_in_miniature(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(workplace))
    monkeypatch.setattr("tempfile.tempdir", None)
    (workplace / "profiles").symlink_to(ROOT / "profiles")
    assert rehearse("paper-qwen-7b", keep=True, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {stage["state"] for stage in printed["stages"]} == {"ok"}
    (folder,) = workplace.glob("dgpo-rehearsal-*")
    episodes = read_episodes(folder / paths.TEACHER_EPISODES)
    assert any(episode.correct for episode in episodes) and all(episode.searches for episode in episodes)
    assert (folder / "models/dgpo/model.safetensors").is_file()
    assert (folder / paths.REPORTS / "index.html").is_file()


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_leaves_no_folder_but_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    def interrupted(folder: Path, resolved: dict[str, Any]) -> list[str]:
        (folder / "models").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tasks.commands.rehearse.prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rehearse("tiny", keep=keep, as_json=False)
    assert len(list(tmp_path.iterdir())) == keep
